"""UpdateBatch: new templates, start times and spacings of the mail that is unsent."""

from __future__ import annotations

import asyncio
import email
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from email import policy
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import batch_pb2, batch_service_pb2_grpc
from outbox.v1.audit_service_pb2 import ListAuditEventsRequest
from outbox.v1.batch_service_pb2 import (
    CancelBatchRequest,
    GetBatchRequest,
    UpdateBatchRequest,
)

from outbox_server.cli.options import to_duration
from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.dispatcher import look_ahead
from outbox_server.services.dispatcher.composer import Composer
from outbox_server.services.dispatcher.storage import UpcomingBatch
from outbox_server.services.scheduler import respreading
from outbox_server.services.scheduler.servicers import batch_control
from outbox_server.services.scheduler.storage.respreading import respread_part
from outbox_server.shared import bounds
from tests.dispatchers import DispatcherProcess, options, running, settings_of
from tests.eventually import eventually
from tests.scheduler_stack import Refusal, Scheduler, refusal_of, running_scheduler
from tests.smtp_servers import ScriptedServer, Succeed, Wait
from tests.world import World

CSV = "email,name,points\n" + "".join(f"r{n}@b.org,Name {n},{n}\n" for n in range(1, 6))
TEXTS: dict[str, Any] = {"subject": "Old {{ name }}", "body": "Hi {{ name }}, {{ points }}"}


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, min_gap="0") as running_one:
        yield running_one


@pytest.fixture
def values(database_url: str, redis_url: str, inbox: Inbox) -> dict[str, str]:
    return options(database_url, redis_url, inbox.url)


def at(**delta: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(datetime.now(UTC) + timedelta(**delta))
    return stamp


async def scheduled(scheduler: Scheduler, csv: str = CSV, **fields: Any) -> batch_pb2.Batch:
    sender = await scheduler.sender()
    fields = {"schedule_time": at(hours=1), **TEXTS, **fields}
    return (await scheduler.schedule(sender, csv, **fields)).batch


async def update(
    scheduler: Scheduler, batch: batch_pb2.Batch, *paths: str, etag: str = "", **fields: Any
) -> batch_pb2.Batch:
    """Update the fields that are given, and reset those of `paths`."""
    more = {name: fields.pop(name) for name in ("request_id", "user_id") if name in fields}
    request = UpdateBatchRequest(
        batch=batch_pb2.Batch(batch_id=batch.batch_id, etag=etag, **fields),
        update_mask=FieldMask(paths=[*fields, *paths]),
        **more,
    )
    return await scheduler.batches.UpdateBatch(request)


async def get(scheduler: Scheduler, batch: batch_pb2.Batch) -> batch_pb2.Batch:
    return await scheduler.batches.GetBatch(GetBatchRequest(batch_id=batch.batch_id))


def due_times(scheduler: Scheduler, batch: batch_pb2.Batch) -> list[datetime]:
    rows = scheduler.rows(
        "SELECT scheduled_at FROM email_jobs WHERE batch_id = %s ORDER BY id", int(batch.batch_id)
    )
    return [due for (due,) in rows]


def subjects(inbox: Inbox, header: str = "Subject") -> set[str]:
    files = [inbox.maildir / "new" / mail.file for mail in inbox.mails]
    return {
        email.message_from_bytes(file.read_bytes(), policy=policy.default)[header] for file in files
    }


async def test_mail_that_was_prepared_ahead_is_sent_with_the_new_templates(
    scheduler: Scheduler,
    values: dict[str, str],
    inbox: Inbox,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(look_ahead, "AHEAD", timedelta(hours=2))
    prepared = asyncio.Event()
    prepare_ahead = Composer.prepare_ahead

    async def note(composer: Composer, batches: Mapping[int, UpcomingBatch]) -> None:
        await prepare_ahead(composer, batches)
        if batches:
            prepared.set()

    monkeypatch.setattr(Composer, "prepare_ahead", note)
    batch = await scheduled(scheduler)
    async with running(settings_of(values)):
        await prepared.wait()
        await update(scheduler, batch, subject="New {{ points }}", schedule_time=at(seconds=0))
        await eventually(lambda: len(inbox.mails) == 5)
    assert subjects(inbox) == {f"New {n}" for n in range(1, 6)}


async def test_mail_is_sent_with_the_new_templates_and_times(
    scheduler: Scheduler, values: dict[str, str], inbox: Inbox
) -> None:
    batch = await scheduled(scheduler)
    new = "New {{ points }}"
    headers = [
        batch_pb2.MailHeader(name="list-unsubscribe", value="<https://b.org/u?id={{ points }}>"),
        batch_pb2.MailHeader(name="X-Kind", value="news"),
    ]
    change = partial(
        update, scheduler, batch, "schedule_time", subject=new, headers=headers, request_id="once"
    )
    answer = await change()
    assert await change() == answer
    # What is stored for a repeated call has nothing that an erasure would have to erase.
    data = scheduler.value("SELECT answer FROM change_requests WHERE request_id = 'once'")
    stored = batch_pb2.Batch.FromString(data)
    assert (len(answer.headers), len(stored.headers), stored.etag) == (2, 0, answer.etag)
    assert answer.etag != batch.etag
    assert not answer.rescheduling
    assert not answer.HasField("subject")
    found = await get(scheduler, batch)
    assert (found.subject, found.headers[0].name) == (new, "List-Unsubscribe")
    async with running(settings_of(values)):
        await eventually(lambda: len(inbox.mails) == 5)
    assert subjects(inbox) == {f"New {n}" for n in range(1, 6)}
    assert subjects(inbox, "List-Unsubscribe") == {f"<https://b.org/u?id={n}>" for n in range(1, 6)}
    assert subjects(inbox, "X-Kind") == {"news"}
    events = await scheduler.audit.ListAuditEvents(ListAuditEventsRequest(user_id="ann"))
    [event] = [one for one in events.audit_events if one.action == "UpdateBatch"]
    assert (event.before["subject"], event.after["subject"]) == (TEXTS["subject"], new)
    assert "X-Kind: news" in str(event.after["headers"])


async def test_no_mail_is_marked_with_the_old_template_after_the_call(
    scheduler: Scheduler, values: dict[str, str]
) -> None:
    # The dispatcher has cached the batch, and has a mail of it in flight.
    body = asyncio.Event()
    async with ScriptedServer({"body": (Wait(body), Succeed())}) as server:
        sender = await scheduler.sender(max_in_flight=1)
        batch = (await scheduler.schedule(sender, CSV, **TEXTS)).batch
        async with running(settings_of({**values, "smtp_url": server.url})):
            await eventually(lambda: server.waiting["body"] == 1)
            await update(scheduler, batch, subject="New {{ points }}")
            body.set()
            await eventually(lambda: len(server.taken) == 5)
        found = [
            str(email.message_from_bytes(mail.data, policy=policy.default)["Subject"])
            for mail in server.taken
        ]
    assert found == ["Old Name 1", *(f"New {n}" for n in range(2, 6))]


async def test_the_waiting_jobs_are_due_one_spacing_apart(scheduler: Scheduler) -> None:
    batch = await scheduled(scheduler, expire_after=timedelta(hours=2))
    start = at(days=2)
    scheduler.execute(
        "UPDATE email_jobs SET state = 6, finished_at = now() WHERE recipient = 'r2@b.org'"
    )
    answer = await update(
        scheduler, batch, schedule_time=start, spacing=to_duration(timedelta(minutes=10))
    )
    first = start.ToDatetime(tzinfo=UTC)
    times = due_times(scheduler, batch)
    del times[1]
    assert times == [first + n * timedelta(minutes=10) for n in range(4)]
    assert answer.schedule_time == start
    assert answer.spacing.ToTimedelta() == timedelta(minutes=10)
    expiring = scheduler.value(
        "SELECT count(*) FROM email_jobs WHERE state = 1"
        " AND expires_at = scheduled_at + interval '2 hours'"
    )
    assert expiring == 4
    found = await get(scheduler, batch)
    assert found.forecast_end_time.ToDatetime(tzinfo=UTC) >= times[-1]
    # Only the spacing: from the same start.
    await update(scheduler, batch, "spacing")
    times = due_times(scheduler, batch)
    assert {*times[:1], *times[2:]} == {first}


async def test_another_scheduler_ends_what_one_that_died_has_begun(
    scheduler: Scheduler, values: dict[str, str], inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after kill -9 of the scheduler between two parts: nothing is sent at an old time."""
    monkeypatch.setattr(batch_control, "_RESPREAD_IN_CALL", 0)

    async def die(_: respreading.Respreader, __: int, *, until: float | None = None) -> None:
        del until

    # Neither the call nor the loop, which has begun already, writes a part.
    monkeypatch.setattr(respreading.Respreader, "_respread", die)
    batch = await scheduled(scheduler, schedule_time=None)
    answer = await update(scheduler, batch, schedule_time=at(days=3))
    assert answer.rescheduling
    async with World(settings_of(values)) as world:
        async with world.engine.begin() as connection:
            assert await respread_part(connection, int(batch.batch_id), 2) is None
        async with running(settings_of(values)) as dispatcher:
            await eventually(dispatcher.serving)
            # The last three jobs are still due now, and none of them is sent.
            assert (await get(scheduler, batch)).rescheduling
            assert await world.redis.keys("*due*") == []
            monkeypatch.undo()
            async with running_scheduler(values["database_url"], values["redis_url"], min_gap="0"):

                async def ended() -> bool:
                    return not (await get(scheduler, batch)).rescheduling

                await eventually(ended)
            assert inbox.mails == []
    assert len(set(due_times(scheduler, batch))) == 1
    assert min(due_times(scheduler, batch)) > datetime.now(UTC) + timedelta(days=2)
    assert not scheduler.rows("SELECT 1 FROM batch_respreads")


async def test_templates_that_do_not_fit_every_unsent_row_change_nothing(
    scheduler: Scheduler,
) -> None:
    csv = CSV + "odd@b.org,Odd,none\n"
    kept = batch_pb2.MailHeader(name="X-Kept", value="{{ name }}")
    batch = await scheduled(scheduler, csv, headers=[kept])

    def header(name: str, value: str, count: int = 1) -> dict[str, Any]:
        return {"headers": [batch_pb2.MailHeader(name=name, value=value)] * count}

    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"body": "{{ points | divided_by: 0 }}"}, "FAILED_PRECONDITION", "ROWS_NOT_RENDERABLE"),
        ({"body": "{{ city }}"}, "INVALID_ARGUMENT", "COLUMN_MISSING"),
        ({"body": "{{ name "}, "INVALID_ARGUMENT", "TEMPLATE_INVALID"),
        ({"subject": "a\nb"}, "INVALID_ARGUMENT", "SUBJECT_LINE_BREAK"),
        ({"body": "x" * (bounds.MAX_TEMPLATE_BYTES + 1)}, "INVALID_ARGUMENT", "TEMPLATE_TOO_LARGE"),
        ({"body": "a\0b"}, "INVALID_ARGUMENT", "TEMPLATE_INVALID"),
        (
            {"spacing": to_duration(timedelta(days=8))},
            "INVALID_ARGUMENT",
            "SPACING_INVALID",
        ),
        ({"batch_id": batch.batch_id}, "INVALID_ARGUMENT", "UPDATE_MASK_INVALID"),
        (header("Subject", "x"), "INVALID_ARGUMENT", "HEADER_INVALID"),
        (header("X-Two", "x", 2), "INVALID_ARGUMENT", "HEADER_INVALID"),
        (header("X-Many", "x", 21), "INVALID_ARGUMENT", "TOO_MANY_HEADERS"),
        (header("X-Line", "a\nb"), "INVALID_ARGUMENT", "HEADER_INVALID"),
        (header("X-Nul", "{{ name }}\0"), "INVALID_ARGUMENT", "HEADER_INVALID"),
        (header("X-City", "{{ city }}"), "INVALID_ARGUMENT", "COLUMN_MISSING"),
        (header("X-Wrong", "{{ name"), "INVALID_ARGUMENT", "TEMPLATE_INVALID"),
        (header("References", "{{ name }}"), "FAILED_PRECONDITION", "ROWS_NOT_RENDERABLE"),
        (
            header("X-Half", "{{ points | divided_by: 0 }}"),
            "FAILED_PRECONDITION",
            "ROWS_NOT_RENDERABLE",
        ),
    ]
    for fields, code, reason in cases:
        fields.pop("batch_id", None)
        refused = await refusal_of(
            update(scheduler, batch, *([] if fields else ["state"]), **fields)
        )
        assert (refused.code, refused.reason) == (code, reason), (fields, refused)
        if reason == "ROWS_NOT_RENDERABLE":
            assert len(refused.metadata["email_job_ids"].split(",")) == 6
    refused = await refusal_of(update(scheduler, batch, "subject"))
    assert refused.reason == "COLUMN_MISSING"
    found = await get(scheduler, batch)
    assert (found.subject, found.body, found.etag) == (*TEXTS.values(), batch.etag)
    assert list(found.headers) == [kept]
    # Without any, they are removed.
    await update(scheduler, batch, "headers")
    assert not (await get(scheduler, batch)).headers


async def test_a_change_names_the_batch_it_is_meant_for(scheduler: Scheduler) -> None:
    batch = await scheduled(scheduler)
    once = await update(scheduler, batch, subject="One", etag=batch.etag, request_id="once")
    assert await update(scheduler, batch, subject="One", etag=batch.etag, request_id="once") == once
    refused = await refusal_of(update(scheduler, batch, subject="Two", etag=batch.etag))
    assert (refused.code, refused.reason) == ("ABORTED", "ETAG_MISMATCH")
    refused = await refusal_of(update(scheduler, batch, subject="Two", user_id="bob"))
    assert (refused.code, refused.reason) == ("NOT_FOUND", "BATCH_NOT_FOUND")
    await scheduler.batches.CancelBatch(CancelBatchRequest(batch_id=batch.batch_id))
    refused = await refusal_of(update(scheduler, batch, subject="Two"))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "BATCH_CANCELLED")


async def test_an_update_of_a_fixed_value_says_so_and_changes_nothing(
    scheduler: Scheduler,
) -> None:
    batch = await scheduled(scheduler, labels={"campaign": "spring"})

    async def refused(**fields: Any) -> Refusal:
        changed = batch_pb2.Batch(batch_id=batch.batch_id, subject="New", **fields)
        request = UpdateBatchRequest(batch=changed)
        return await refusal_of(scheduler.batches.UpdateBatch(request))

    wrong: dict[str, Any] = {
        "state": batch_pb2.BATCH_STATE_PAUSED,
        "sender_id": "7",
        "reply_to": "me@x.org",
        "external_id": "mine",
        "labels": {"campaign": "autumn"},
        "expire_after": to_duration(timedelta(hours=1)),
    }
    refusal = await refused(**wrong)
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "UPDATE_MASK_INVALID")
    # All at once, and what to use instead.
    assert set(refusal.violations) == {f"batch.{name}" for name in wrong}
    assert "PauseBatch" in refusal.violations["batch.state"]
    masked = await refusal_of(update(scheduler, batch, "state"))
    assert "PauseBatch" in masked.violations["update_mask"]
    assert (await get(scheduler, batch)).etag == batch.etag
    # A changed copy of what was read has the present values.
    copy = await get(scheduler, batch)
    copy.subject = "Copy"
    updated = await scheduler.batches.UpdateBatch(UpdateBatchRequest(batch=copy))
    assert updated.etag != batch.etag
    assert (await get(scheduler, batch)).subject == "Copy"
    # So has a copy from before a pause ended by itself, and one from before a cancellation.
    copy.state = batch_pb2.BATCH_STATE_PAUSED
    copy.pause_end_time.FromDatetime(datetime.now(UTC) - timedelta(minutes=1))
    copy.etag = ""
    await scheduler.batches.UpdateBatch(UpdateBatchRequest(batch=copy))
    copy.pause_end_time.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    later = await refusal_of(scheduler.batches.UpdateBatch(UpdateBatchRequest(batch=copy)))
    assert set(later.violations) == {"batch.state"}
    await scheduler.batches.CancelBatch(CancelBatchRequest(batch_id=batch.batch_id))
    late = await refusal_of(scheduler.batches.UpdateBatch(UpdateBatchRequest(batch=copy)))
    assert late.reason == "BATCH_CANCELLED"


async def test_a_large_batch_gets_a_simple_template_but_none_that_must_be_tried(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MAX_CHECKED_JOBS", 4)
    batch = await scheduled(scheduler)
    await update(scheduler, batch, body="Dear {{ name }}, you have {{ points }}")
    refused = await refusal_of(update(scheduler, batch, body="{{ points | divided_by: 2 }}"))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "BATCH_TOO_LARGE_TO_CHECK")


async def test_a_scheduler_that_is_killed_while_it_writes_new_times_loses_nothing(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    """kill -9 of the process in the middle of 60,000 rows; another process ends the work."""
    settings = {
        "database_url": database_url,
        "redis_url": redis_url,
        "auth": "off",
        "min_gap": "0",
        "user_waiting_jobs": "1000000",
    }
    csv = "email\n" + "".join(f"r{n}@b.org\n" for n in range(60_000))
    async with running_scheduler(
        database_url, redis_url, min_gap="0", user_waiting_jobs=1_000_000
    ) as first:
        batch = await scheduled(first, csv, subject="Hello", body="Hi")
        process = DispatcherProcess(settings, tmp_path / "scheduler.log", "scheduler")
        await process.start()
        start = at(days=4)
        async with grpc.aio.insecure_channel(await process.address()) as channel:
            stub = batch_service_pb2_grpc.BatchServiceStub(channel)
            request = UpdateBatchRequest(
                batch=batch_pb2.Batch(
                    batch_id=batch.batch_id,
                    schedule_time=start,
                    spacing=to_duration(timedelta(seconds=1)),
                )
            )
            call = stub.UpdateBatch(request)
            await eventually(lambda: first.rows("SELECT 1 FROM batch_respreads"))
            await process.kill()
            call.cancel()

        async def ended() -> bool:
            return not (await get(first, batch)).rescheduling

        await eventually(ended)
        begin = start.ToDatetime(tzinfo=UTC)
        times = due_times(first, batch)
        assert times == [begin + n * timedelta(seconds=1) for n in range(60_000)]
