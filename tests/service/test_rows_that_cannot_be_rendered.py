"""A row that its templates cannot render is rejected at intake, by every way in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from outbox.v1 import batch_pb2, sender_pb2
from outbox.v1.batch_service_pb2 import (
    GetBatchRequest,
    ListRejectionsRequest,
    ScheduleBatchRequest,
    ScheduleBatchResponse,
    UploadBatchRequest,
)

from tests.eventually import eventually
from tests.for_each import for_each_case
from tests.scheduler_stack import Scheduler, options_for, refusal_of, running_scheduler
from tests.worker_processes import workers_here

POINTS = "email,name,points\nann@b.org,Ann,120\nbob@b.org,Bob,80\ncy@b.org,Cy,\n"
GOLD = "{% if points > 100 %}gold{% endif %}"
# Sorts a list a thousand times if the cell says so; otherwise it costs nothing.
COSTLY = (
    "{% if points == 1 %}{% assign l = name | split: ',' %}{% for i in (1..1000) %}"
    "{% assign m = l | sort | reverse | uniq %}{% endfor %}{% endif %}"
)
LONG = ",".join(f"item{n}" for n in range(900))


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, template_budget="300ms") as running:
        yield running


@pytest_asyncio.fixture
async def sender(scheduler: Scheduler) -> sender_pb2.Sender:
    return await scheduler.sender()


async def by_csv(scheduler: Scheduler, options: batch_pb2.BatchOptions) -> ScheduleBatchResponse:
    request = ScheduleBatchRequest(options=options, csv=POINTS.encode())
    return await scheduler.batches.ScheduleBatch(request)


async def by_rows(scheduler: Scheduler, options: batch_pb2.BatchOptions) -> ScheduleBatchResponse:
    names, *rows = (line.split(",") for line in POINTS.splitlines())
    request = ScheduleBatchRequest(options=options)
    for row in rows:
        columns = dict(zip(names[1:], row[1:], strict=True))
        request.recipients.rows.add(email=row[0], columns=columns)
    return await scheduler.batches.ScheduleBatch(request)


async def by_upload(scheduler: Scheduler, options: batch_pb2.BatchOptions) -> ScheduleBatchResponse:
    async def messages() -> AsyncIterator[UploadBatchRequest]:
        yield UploadBatchRequest(options=options)
        for character in POINTS:
            yield UploadBatchRequest(chunk=character.encode())

    return await scheduler.batches.UploadBatch(messages())


@pytest.mark.parametrize("way", [by_csv, by_rows, by_upload])
async def test_a_row_that_no_mail_can_be_made_of_is_rejected_by_every_way_in(
    scheduler: Scheduler, sender: sender_pb2.Sender, way: type[object]
) -> None:
    answer = await way(scheduler, options_for(sender, body=GOLD))  # type: ignore[call-arg,misc]
    assert (answer.batch.accepted_count, answer.batch.rejected_count) == (2, 1)
    (found,) = answer.rejections
    assert (found.row_number, found.column) == (3, "points")
    assert found.reason == "TEMPLATE_RENDER_FAILED"
    assert found.message == (
        "in options.body: line 1, column 14: `points` is empty, so it cannot be compared with a "
        "number"
    )
    request = ListRejectionsRequest(batch_id=answer.batch.batch_id)
    assert list((await scheduler.batches.ListRejections(request)).rejections) == [found]
    column = "" if way is by_rows else "email"
    assert answer.batch.email_column == column
    again = await scheduler.batches.GetBatch(GetBatchRequest(batch_id=answer.batch.batch_id))
    assert again.email_column == column

    strict = options_for(sender, body=GOLD, mode=batch_pb2.BATCH_MODE_STRICT)
    refused = await refusal_of(way(scheduler, strict))  # type: ignore[call-arg,arg-type]
    assert refused.reason == "ROW_REJECTED"
    assert list(refused.violations) == ["rows[3].points"]


@for_each_case(
    "templates rows reason",
    [
        ({"subject": GOLD}, [3], "TEMPLATE_RENDER_FAILED"),
        ({"html": "{{ 100 | divided_by: points }}"}, [3], "TEMPLATE_RENDER_FAILED"),
        ({"body": "{{ name | base64_decode }}"}, [1, 2, 3], "TEMPLATE_RENDER_FAILED"),
        ({"body": "{% for i in (1..points) %}x{% endfor %}", "html": GOLD}, [3], ""),
        ({"subject": "{{ name | append: points | newline_to_br }}\n."}, [1, 2, 3], "SUBJECT_"),
        (
            {
                "body": "{% for i in (99..points) %}"
                "{% for j in (1..1000) %}x{% endfor %}{% endfor %}"
            },
            [1],
            "TEMPLATE_LIMIT",
        ),
        ({"body": "{{ now | date: '%Y' }} {{ today }}"}, [], ""),
    ],
)
async def test_each_template_is_rendered_with_each_row(
    scheduler: Scheduler,
    sender: sender_pb2.Sender,
    templates: dict[str, str],
    rows: list[int],
    reason: str,
) -> None:
    options = options_for(sender, **templates)
    if rows == [1, 2, 3]:
        refused = await refusal_of(by_csv(scheduler, options))
        assert refused.reason == "NO_ROW_ACCEPTED"
        assert len(refused.violations) == len(rows)
        return
    answer = await by_csv(scheduler, options)
    assert [row.row_number for row in answer.rejections] == rows
    assert all(reason in row.reason for row in answer.rejections)
    assert answer.batch.accepted_count == 3 - len(rows)


async def test_a_row_that_cannot_be_rendered_is_not_the_first_of_its_address(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    csv = "email,points\nann@b.org,\nann@b.org,101\nANN@b.org,7\n"
    answer = await scheduler.schedule(sender, csv, body=GOLD)
    assert [row.row_number for row in answer.rejections] == [1]
    assert (answer.batch.accepted_count, answer.batch.duplicate_count) == (1, 1)


async def test_failures_are_found_in_every_block_and_in_their_order(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    bad = {1, 2_499, 2_500, 2_501, 5_000, 5_001, 9_999, 12_000}
    lines = (f"u{n}@b.org,{'x' if n in bad else n}" for n in range(1, 12_001))
    answer = await scheduler.schedule(sender, "email,points\n" + "\n".join(lines), body=GOLD)
    assert answer.batch.accepted_count == 12_000 - len(bad)
    assert [row.row_number for row in answer.rejections] == sorted(bad)


async def test_a_row_that_is_too_costly_is_rejected_alone(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    lines = [f'u{n}@b.org,"{LONG}",{int(n == 7)}' for n in range(40)]
    answer = await scheduler.schedule(sender, "email,name,points\n" + "\n".join(lines), body=COSTLY)
    (found,) = answer.rejections
    assert (found.row_number, found.reason) == (8, "TEMPLATE_TOO_COSTLY")
    assert "more than 300ms of processor time (OUTBOX_TEMPLATE_BUDGET)" in found.message
    assert answer.batch.accepted_count == 39


async def test_a_batch_whose_rows_are_too_costly_on_average_is_refused(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    lines = [f'u{n}@b.org,"{LONG}",1' for n in range(40)]
    csv = "email,name,points\n" + "\n".join(lines)
    refused = await refusal_of(scheduler.schedule(sender, csv, body=COSTLY))
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "TEMPLATE_TOO_COSTLY")
    assert scheduler.value("SELECT count(*) FROM batches") == 0
    # The workers go on.
    assert (await by_csv(scheduler, options_for(sender, body=GOLD))).batch.accepted_count == 2


async def test_a_call_that_is_cancelled_ends_its_rendering(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url, template_budget="1m") as scheduler:
        sender = await scheduler.sender()
        await by_csv(scheduler, options_for(sender, body=GOLD))
        spent = {worker: worker.cpu_seconds() for worker in workers_here()}
        row = f'a@b.org,"{LONG}",1\n'
        call = asyncio.ensure_future(
            scheduler.schedule(sender, f"email,name,points\n{row}", body=COSTLY * 20)
        )
        # It may be a worker that was started for this call.
        (busy,) = await eventually(
            lambda: [
                each for each in workers_here() if each.cpu_seconds() > spent.get(each, 0.0) + 0.3
            ]
        )
        call.cancel()
        await eventually(lambda: not busy.is_running())
        assert (await by_csv(scheduler, options_for(sender, body=GOLD))).batch.accepted_count == 2
        assert scheduler.value("SELECT count(*) FROM batches") == 2
