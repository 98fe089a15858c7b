"""One batch per request_id, over a real channel, on real stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import batch_pb2, sender_pb2
from outbox.v1.batch_service_pb2 import (
    ScheduleBatchResponse,
)

from tests.for_each import for_each_case
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler

STRICT = batch_pb2.BATCH_MODE_STRICT
KEEP_ALL = batch_pb2.DUPLICATE_POLICY_KEEP_ALL


@pytest_asyncio.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, max_message_bytes=4096) as running:
        yield running


@pytest_asyncio.fixture
async def sender(scheduler: Scheduler) -> sender_pb2.Sender:
    return await scheduler.sender()


async def test_a_repeated_request_gives_the_same_batch(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    csv = "email,name\na@b.org,Ann\nx,y\n"
    first = await scheduler.schedule(sender, csv, request_id="once")
    again = await scheduler.schedule(
        sender,
        csv,
        request_id="once",
        # An explicit default is the same as an unset field.
        user_id="ann",
        mode=batch_pb2.BATCH_MODE_PERMISSIVE,
        spacing=Duration(),
        time_zone="UTC",
    )
    assert (first.replayed, again.replayed) == (False, True)
    assert again.rejections == first.rejections
    assert again.batch.batch_id == first.batch.batch_id
    assert scheduler.value("SELECT count(*) FROM email_jobs") == 1


@for_each_case(
    "change",
    [
        ({"csv": "email\nb@b.org\n"},),
        ({"csv": "email\na@b.org"},),
        ({"subject": "Other"},),
        ({"body": None, "html": "Good day"},),
        ({"spacing": Duration(seconds=1)},),
        ({"schedule_time": Timestamp(seconds=4_000_000_000)},),
        ({"mode": STRICT},),
        ({"duplicates": KEEP_ALL},),
        ({"time_zone": "Europe/Berlin"},),
        ({"csv": b"\xff"},),
    ],
)
async def test_a_different_batch_with_a_used_request_id_is_an_error(
    scheduler: Scheduler, sender: sender_pb2.Sender, change: dict[str, Any]
) -> None:
    first = await scheduler.schedule(sender, request_id="once")
    refusal = await refusal_of(scheduler.schedule(sender, **{"request_id": "once", **change}))
    assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    assert scheduler.rows("SELECT id FROM batches") == [(int(first.batch.batch_id),)]


async def test_request_ids_are_separate_per_user(scheduler: Scheduler) -> None:
    first = await scheduler.schedule(await scheduler.sender("ann"), request_id="once")
    second = await scheduler.schedule(await scheduler.sender("bob"), request_id="once")
    assert first.batch.batch_id != second.batch.batch_id
    other_sender = await scheduler.sender("ann")
    refusal = await refusal_of(scheduler.schedule(other_sender, request_id="once"))
    assert refusal.reason == "REQUEST_ID_REUSED"


async def test_ten_concurrent_equal_requests_create_one_batch(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    csv = "email\n" + "".join(f"u{i}@b.org\n" for i in range(7_000))
    calls = [scheduler.schedule(sender, csv, request_id="once") for _ in range(10)]
    answers = await asyncio.gather(*calls)
    assert [answer.replayed for answer in answers].count(False) == 1
    assert len({answer.batch.batch_id for answer in answers}) == 1
    assert scheduler.value("SELECT count(*) FROM email_jobs") == 7_000


async def test_one_of_several_concurrent_requests_with_the_same_id_wins(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    calls = [
        scheduler.schedule(sender, f"email\nu{i}@b.org\n", request_id="once") for i in range(5)
    ]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    won = [answer for answer in answers if isinstance(answer, ScheduleBatchResponse)]
    assert len(won) == 1
    assert scheduler.value("SELECT count(*) FROM batches") == 1


async def test_a_batch_whose_commit_was_lost_is_accepted_by_the_next_try(
    scheduler: Scheduler, sender: sender_pb2.Sender
) -> None:
    """As after a failover to a replica that lagged, just when the commit was answered."""
    csv = "email\n" + "".join(f"u{i}@b.org\n" for i in range(1_500))
    # The load of the head, after the commit, deletes a marker.
    await scheduler.define(
        "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " DELETE FROM email_jobs; DELETE FROM count_deltas; DELETE FROM batches; RETURN NULL;"
        " END $$"
    )
    await scheduler.define(
        "CREATE TRIGGER lose AFTER DELETE ON head_markers FOR EACH STATEMENT"
        " EXECUTE FUNCTION lose()"
    )
    try:
        refusal = await refusal_of(scheduler.schedule(sender, csv, request_id="once"))
        assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
        assert scheduler.value("SELECT count(*) FROM batches") == 0
    finally:
        await scheduler.define("DROP FUNCTION lose() CASCADE")

    again = await scheduler.schedule(sender, csv, request_id="once")
    assert (again.replayed, again.batch.accepted_count) == (False, 1_500)
