"""A job that its server defers, and the reply class of each attempt, in PostgreSQL."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.storage import AttemptRecord, MarkedJob
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.states import AttemptOutcome, JobState, ReplyClass
from tests.marked_jobs import mark_refs, raw
from tests.retrying import retry_failed
from tests.world import World

LEASE = timedelta(minutes=1)


async def attempt(
    connection: AsyncConnection,
    job: int,
    number: int,
    *,
    deferred: bool = False,
    state: JobState = JobState.SCHEDULED,
    reply_class: ReplyClass | None = None,
) -> MarkedJob:
    """Make one attempt at a job; return the marked job."""
    [marked] = await mark_refs(connection, [JobRef(job, number)], LEASE)
    now = time.monotonic()
    record = AttemptRecord(
        job=marked.job,
        sender_id=marked.sender_id,
        state=state,
        failures=0,
        outcome=AttemptOutcome.TEMPORARY_FAILURE,
        counted=False,
        started=now,
        ended=now,
        retry_after=timedelta(0),
        reply_class=reply_class,
        deferred=deferred,
    )
    assert await storage.settle(await raw(connection), [record], now)
    return marked


async def since(world: World, job: int) -> Any:
    return (await world.job(job)).deferred_since


async def test_the_first_deferral_sets_the_time_and_later_ones_keep_it(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await world.schedule(await world.sender(), load=False)
    first = await attempt(connection, job, 1)
    assert (first.deferred_for, await since(world, job)) == (None, None)

    second = await attempt(connection, job, 2, deferred=True)
    began = await since(world, job)
    assert second.deferred_for is None
    assert began.timestamp() == (await world.attempts(job))[1].ended_at

    third = await attempt(connection, job, 3, deferred=True)
    assert third.deferred_for is not None
    assert third.deferred_for >= timedelta(0)
    assert await since(world, job) == began
    # An attempt that fails in another way does not change the time either.
    await attempt(connection, job, 4)
    assert await since(world, job) == began


async def test_a_mark_returns_how_long_the_job_has_been_deferred(
    world: World, connection: AsyncConnection
) -> None:
    [job] = await world.schedule(await world.sender(), load=False)
    await attempt(connection, job, 1, deferred=True)
    await world.sql("UPDATE email_jobs SET deferred_since = now() - interval '3 hours'")

    second = await attempt(connection, job, 2, deferred=True)

    assert second.deferred_for is not None
    assert timedelta(hours=3) <= second.deferred_for < timedelta(hours=3, minutes=5)


async def test_a_retry_of_a_job_that_failed_while_deferred_restarts_its_deferral(
    world: World, connection: AsyncConnection
) -> None:
    sender = await world.sender()
    [job] = await world.schedule(sender, load=False)
    await attempt(connection, job, 1, deferred=True)
    await attempt(connection, job, 2, deferred=True, state=JobState.FAILED)
    assert await since(world, job) is not None

    assert await retry_failed(world.engine, "sender_id", sender) == 1
    assert await since(world, job) is None
    assert (await attempt(connection, job, 3)).deferred_for is None


@pytest.mark.parametrize("reply_class", [None, *ReplyClass])
async def test_an_attempt_keeps_the_class_of_its_reply(
    world: World, connection: AsyncConnection, reply_class: ReplyClass | None
) -> None:
    [job] = await world.schedule(await world.sender(), load=False)
    await attempt(connection, job, 1, reply_class=reply_class)

    [row] = await world.sql("SELECT reply_class FROM attempts WHERE email_job_id = %s", job)
    assert row.reply_class == reply_class
