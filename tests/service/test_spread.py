"""`spread_until`: a batch of any number of rows is spread evenly up to a time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from outbox.v1 import sender_pb2
from outbox.v1.batch_service_pb2 import ScheduleBatchResponse, UploadBatchRequest
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import CreateSuppressionRequest

from outbox_server.cli.options import to_duration, to_timestamp
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, options_for, refusal_of

HOUR = timedelta(hours=1)


@pytest.fixture
async def sender(scheduler: Scheduler) -> sender_pb2.Sender:
    return await scheduler.sender()


def soon() -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + HOUR


async def upload(
    scheduler: Scheduler, sender: sender_pb2.Sender, *chunks: str, **options: Any
) -> ScheduleBatchResponse:
    async def messages() -> AsyncIterator[UploadBatchRequest]:
        yield UploadBatchRequest(options=options_for(sender, **options))
        for chunk in chunks:
            yield UploadBatchRequest(chunk=chunk.encode())

    return await scheduler.batches.UploadBatch(messages())


def times(scheduler: Scheduler) -> list[tuple[int, datetime, datetime | None]]:
    return [
        (row, due, expires)
        for row, due, expires in scheduler.rows(
            "SELECT row_number, scheduled_at, expires_at FROM email_jobs ORDER BY id"
        )
    ]


async def test_only_accepted_rows_are_spread_from_the_start_to_the_end(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    gone = Suppression(user_id="ann", email="gone@b.org")
    await scheduler.suppressions.CreateSuppression(
        CreateSuppressionRequest(user_id="ann", suppression=gone)
    )
    start = soon()
    own = start + timedelta(minutes=7)
    answer = await upload(
        scheduler,
        sender,
        "email,schedule_time\na@b.org,\nnobody,\ngone@b.org,\na@b.org,\nb@b.org,\n",
        f"own@b.org,{own.isoformat()}\nc@b.org,\nd@b.org,\n",
        schedule_time=to_timestamp(start),
        spread_until=to_timestamp(start + HOUR),
        expire_after=to_duration(2 * HOUR),
    )
    batch = answer.batch
    assert (batch.accepted_count, batch.rejected_count) == (5, 1)
    assert (batch.duplicate_count, batch.suppressed_count) == (1, 1)
    dues = [(1, start), (5, start + HOUR / 3), (6, own), (7, start + HOUR * 2 / 3)]
    dues.append((8, start + HOUR))
    assert times(scheduler) == [(row, due, due + 2 * HOUR) for row, due in dues]
    assert batch.spacing.ToTimedelta() == HOUR / 3
    assert scheduler.value("SELECT last_due_at FROM batches") == start + HOUR
    assert answer.forecast_end_time.ToDatetime(UTC) == start + HOUR


async def test_a_batch_of_one_message_begins_now_and_its_last_mail_is_due_at_the_end(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    until = datetime.now(UTC) + timedelta(seconds=2)
    rows = "".join(f"u{number}@b.org\n" for number in range(8))
    options: dict[str, Any] = {"request_id": "spread", "spread_until": to_timestamp(until)}
    answer = await scheduler.schedule(sender, "email\n" + rows, **options)
    found = [due for _, due, _ in times(scheduler)]
    assert found[0] == scheduler.value("SELECT created_at FROM batches")
    assert found[-1] == until
    step = (until - found[0]) / 7
    exact = [found[0] + place * (until - found[0]) / 7 for place in range(8)]
    assert [
        abs(due - wanted) // timedelta(microseconds=2)
        for due, wanted in zip(found, exact, strict=True)
    ] == [0] * 8
    assert abs(answer.batch.spacing.ToTimedelta() - step) < timedelta(milliseconds=1)
    # The same request returns the same batch, even after that time.
    await eventually(lambda: datetime.now(UTC) > until)
    assert (await scheduler.schedule(sender, "email\n" + rows, **options)).replayed
    options["spread_until"] = to_timestamp(until + HOUR)
    refusal = await refusal_of(scheduler.schedule(sender, "email\n" + rows, **options))
    assert refusal.reason == "REQUEST_ID_REUSED"


async def test_a_single_spread_row_is_due_at_the_start_and_a_batch_without_one_is_accepted(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    start = soon()
    options: dict[str, Any] = {
        "schedule_time": to_timestamp(start),
        "spread_until": to_timestamp(start + HOUR),
    }
    one = (await scheduler.schedule(sender, **options)).batch
    assert [due for _, due, _ in times(scheduler)] == [start]
    assert one.spacing.ToTimedelta() == timedelta(0)
    own = start + timedelta(minutes=1)
    csv = f"email,schedule_time\na@b.org,{own.isoformat()}\n"
    await scheduler.schedule(sender, csv, **options)
    assert [due for _, due, _ in times(scheduler)] == [start, own]
    gone = Suppression(user_id="ann", email="a@b.org")
    await scheduler.suppressions.CreateSuppression(
        CreateSuppressionRequest(user_id="ann", suppression=gone)
    )
    assert (await scheduler.schedule(sender, **options)).batch.accepted_count == 0


async def test_options_that_exclude_a_spread_are_refused_and_change_nothing(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    start = soon()
    last = datetime(9999, 12, 31, tzinfo=UTC)
    wrong: list[dict[str, datetime | timedelta]] = [
        {"spread_until": start, "schedule_time": start},
        {"spread_until": datetime.now(UTC) - timedelta(seconds=1)},
        {"spread_until": datetime.now(UTC) - HOUR, "schedule_time": start - 10 * HOUR},
        {"spread_until": start, "spacing": timedelta(seconds=1)},
        {"spread_until": last, "expire_after": timedelta(days=2)},
    ]
    for options in wrong:
        fields: dict[str, Any] = {
            name: to_timestamp(value) if isinstance(value, datetime) else to_duration(value)
            for name, value in options.items()
        }
        refusal = await refusal_of(scheduler.schedule(sender, **fields))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "SPREAD_UNTIL_INVALID")
        assert list(refusal.violations) == ["options.spread_until"]
    for table in ("batches", "email_jobs", "head_markers"):
        assert scheduler.value(f"SELECT count(*) FROM {table}") == 0
