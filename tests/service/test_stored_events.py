"""The quota of stored events: a user's oldest ones are removed, and its readers are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1.webhook_pb2 import Webhook
from outbox.v1.webhook_service_pb2 import UpdateWebhookRequest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.forgetting import Forgetter
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.database.models import JobEventCounting
from outbox_server.shared.errors import FailedPrecondition
from outbox_server.shared.events import removing
from outbox_server.shared.events.watching import EventFilter, EventWatch
from outbox_server.shared.secrets import generate_key
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import Scheduler, refusal_of, running_scheduler
from tests.service.test_watch_email_jobs import JobWatch
from tests.service.test_webhooks import change, create, receiving

MOST = 10


@pytest_asyncio.fixture
async def scheduler(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Scheduler]:
    # One process at a time counts, so the scheduler's own turns would skip those of the tests. Its
    # first one, at the start, may still run.
    monkeypatch.setattr("outbox_server.services.scheduler.forgetting._OFTEN", timedelta(hours=1))
    async with running_scheduler(
        database_url, redis_url, encryption_keys=generate_key(), webhook_allow="127.0.0.1"
    ) as running:
        yield running


@pytest_asyncio.fixture
async def engine(scheduler: Scheduler) -> AsyncIterator[AsyncEngine]:
    made = create_engine(scheduler.settings)
    yield made
    await made.dispose()


def add_events(scheduler: Scheduler, user_id: str, count: int, age: str = "0") -> None:
    # With the lock that the triggers take: readers see by it which ids are not committed yet.
    scheduler.execute(
        "WITH locked AS MATERIALIZED (SELECT pg_advisory_xact_lock_shared(7402311917))"
        "INSERT INTO job_events (user_id, sender_id, batch_id, email_job_id, state, attempt,"
        " happened_at) SELECT %s, 1, 1, n, 6, 0, now() - %s::interval"
        " FROM locked, generate_series(1, %s) n",
        user_id,
        age,
        count,
    )


def ids_of(scheduler: Scheduler, user_id: str) -> list[int]:
    rows = scheduler.rows("SELECT id FROM job_events WHERE user_id = %s ORDER BY id", user_id)
    return [row[0] for row in rows]


def counts(scheduler: Scheduler) -> dict[str, int]:
    return dict(scheduler.rows("SELECT user_id, n FROM job_event_counts WHERE n > 0"))


async def lock_counting(connection: AsyncConnection) -> None:
    """Wait for the lock. A step does not wait, and does nothing while the scheduler has it."""
    await connection.execute(select(JobEventCounting.counted_to).with_for_update())


async def forgotten(engine: AsyncEngine, scheduler: Scheduler, retention: str = "7 days") -> None:
    """Count and remove, until all is counted and nothing is too much."""
    forgetter = Forgetter(
        engine,
        None,
        event_retention=timedelta(days=int(retention.split(maxsplit=1)[0])),
        most_job_events=MOST,
    )
    drawn = scheduler.value("SELECT max(id) FROM job_events")

    async def done() -> bool:
        # The scheduler itself may hold the lock, or a transaction may delay the horizon.
        await forgetter.forget()
        return bool(
            scheduler.value("SELECT counted_to FROM job_event_counting") >= drawn
            and not scheduler.value(
                "SELECT count(*) FROM job_event_counts LEFT JOIN users USING (user_id)"
                " WHERE n > coalesce(stored_events, %s)",
                MOST,
            )
        )

    await eventually(done)


async def test_the_oldest_events_above_the_quota_are_removed_and_no_reader_misses_it(
    scheduler: Scheduler, engine: AsyncEngine
) -> None:
    scheduler.execute("INSERT INTO users (user_id, stored_events) VALUES ('ann', 1000)")
    async with receiving() as evil, receiving("500 No") as other:
        webhook = await create(scheduler, evil.url, "eve", disabled=True)
        hers = await create(scheduler, other.url, "ann", disabled=True)
        tokens = {}
        for user_id in ("eve", "ann"):
            watch = await JobWatch(scheduler, user_id).begun()
            watch.stream.cancel()
            tokens[user_id] = watch.token
        add_events(scheduler, "ann", 25)
        add_events(scheduler, "eve", 40)
        all_of = {user_id: ids_of(scheduler, user_id) for user_id in tokens}
        await forgotten(engine, scheduler)
        assert ids_of(scheduler, "eve") == all_of["eve"][-MOST:]
        assert ids_of(scheduler, "ann") == all_of["ann"]
        assert counts(scheduler) == {"ann": 25, "eve": MOST}

        refusal = await refusal_of(
            JobWatch(scheduler, "eve", resume_token=tokens["eve"]).stream.read()
        )
        assert refusal.reason == "RESUME_TOKEN_EXPIRED"
        resumed = await JobWatch(scheduler, "ann", resume_token=tokens["ann"]).begun()
        assert len(await resumed.events(25)) == 25
        start = Timestamp()
        start.FromDatetime(datetime.now(UTC) - timedelta(hours=1))
        again = await JobWatch(scheduler, "eve", start_time=start).begun()
        found = await again.events(MOST)
        assert [int(one.email_job_event_id) for one in found] == all_of["eve"][-MOST:]

        evil.answers = ["500 No"]
        for one in (webhook, hers):
            await scheduler.webhooks.UpdateWebhook(
                UpdateWebhookRequest(
                    webhook=Webhook(webhook_id=one.webhook_id),
                    update_mask=FieldMask(paths=["disabled"]),
                )
            )
        # Told again after a failure, and before the events that are left.
        await eventually(lambda: len(evil.posts) == 3)
        kinds = [post.content["type"] for post in evil.posts]
        assert kinds == [*["email_jobs.events_removed"] * 2, "email_jobs.changed"]
        told = [post.content["data"] for post in evil.posts[:2]]
        last = str(all_of["eve"][-MOST - 1])
        assert told == [{"webhook_id": webhook.webhook_id, "last_removed_event_id": last}] * 2
        posted = [int(event["email_job_event_id"]) for event in evil.job_events()]
        assert posted == all_of["eve"][-MOST:]
        await eventually(lambda: scheduler.rows("SELECT 1 FROM webhook_deliveries"))
        assert len(other.job_events()) == 25
        # Its events are removed before it is tried again.
        scheduler.execute("UPDATE users SET stored_events = 5 WHERE user_id = 'ann'")
        await forgotten(engine, scheduler)
        await change(scheduler, "UPDATE webhook_deliveries SET next_at = now()")
        await change(scheduler, "UPDATE webhooks SET next_at = now()")

        def given_up() -> bool:
            rows = scheduler.rows("SELECT next_at, error FROM webhook_deliveries")
            return rows == [(None, "its events were removed")]

        await eventually(given_up)
        assert len(other.posts) == 1
        # That was no failure of the receiver, so nothing else waits for it.
        failed = scheduler.rows(
            "SELECT failures, error FROM webhooks WHERE id = %s", int(hers.webhook_id)
        )
        assert failed == [(1, "127.0.0.1 answered 500")]


async def test_a_watch_that_is_too_slow_ends(scheduler: Scheduler, engine: AsyncEngine) -> None:
    watch = EventWatch(engine, timedelta(days=7), pause=timedelta(milliseconds=20), page=5)
    pages = watch.follow(EventFilter("eve"), None)
    stop = asyncio.Event()
    running = asyncio.create_task(watch.run(stop))
    await anext(pages)
    add_events(scheduler, "eve", 40)
    await forgotten(engine, scheduler)

    async def read_all() -> None:
        async with asyncio.timeout(PATIENCE):
            async for _ in pages:
                pass

    with pytest.raises(FailedPrecondition, match="were removed"):
        await read_all()
    stop.set()
    await running


async def test_counts_stay_exact_when_old_events_are_removed_and_when_a_process_dies(
    scheduler: Scheduler, engine: AsyncEngine
) -> None:
    add_events(scheduler, "eve", 15, age="30 days")
    add_events(scheduler, "ann", 5, age="30 days")
    add_events(scheduler, "eve", 5)
    await forgotten(engine, scheduler)
    assert counts(scheduler) == {"eve": 5}
    removed = dict(scheduler.rows("SELECT user_id, removed_to FROM job_event_counts"))
    first = min(ids_of(scheduler, "eve"))
    assert removed == {"ann": first - 1, "eve": first - 6}
    # A process dies in the middle of a step: nothing of the step is left.
    add_events(scheduler, "eve", 20)
    horizon = scheduler.value("SELECT max(id) FROM job_events")
    async with engine.connect() as connection:
        await lock_counting(connection)
        await removing.count_events(connection, horizon, 100)
        assert await removing.remove_surplus_events(connection, "eve", MOST, 7) == 7
        await connection.rollback()
    assert len(ids_of(scheduler, "eve")) == 25
    # It dies between two steps: the next one continues.
    for step in range(3):
        async with engine.begin() as connection:
            await lock_counting(connection)
            await removing.count_events(connection, horizon, 100)
            (one,) = await removing.find_surplus(connection, MOST, 10)
            assert await removing.remove_surplus_events(connection, "eve", one.quota, 7)
        assert counts(scheduler) == {"eve": len(ids_of(scheduler, "eve"))}, step
    assert len(ids_of(scheduler, "eve")) == MOST
    # A process that has found the user before removes nothing more.
    async with engine.begin() as connection:
        await lock_counting(connection)
        assert not await removing.remove_surplus_events(connection, "eve", one.quota, 7)
    await forgotten(engine, scheduler)
    assert len(ids_of(scheduler, "eve")) == MOST
