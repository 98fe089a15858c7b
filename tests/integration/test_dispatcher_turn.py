"""One statement records what ended and marks what was claimed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta

import psycopg
import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.dispatcher.cooling import CooldownRules
from outbox_server.services.dispatcher.ended_claims import EndedAttempt
from outbox_server.services.dispatcher.settler import Settler
from outbox_server.services.dispatcher.slots import Slots
from outbox_server.services.dispatcher.storage import MarkedJob
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.records import Claim, LimitUse
from outbox_server.shared.states import JobState, SenderState
from tests.dispatchers import options, settings_of
from tests.eventually import PATIENCE, eventually
from tests.marked_jobs import mark_refs, record_of
from tests.slot_steps import relay
from tests.world import World

LEASE = timedelta(minutes=1)
# A locked row would hold the others up for ever; this is far below that.
SOON = 30.0


@pytest_asyncio.fixture
async def world(database_url: str, redis_url: str) -> AsyncIterator[World]:
    settings = settings_of(options(database_url, redis_url, "smtp://127.0.0.1:1", lease="60s"))
    async with World(settings) as world:
        yield world


@asynccontextmanager
async def settling(
    world: World, statements: AsyncEngine, slots: Slots, hand_over: Callable[[int], None]
) -> AsyncIterator[Settler]:
    rules = CooldownRules.from_settings(world.settings)
    settler = Settler(
        statements, world.engine, world.loader, slots, rules, lease=LEASE, hand_over=hand_over
    )
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(settler.run())
        yield settler
        settler.close()


async def one_sending(
    world: World, statements: AsyncEngine, waiting: int = 1
) -> tuple[EndedAttempt, list[Claim]]:
    """Claim jobs of different senders. Return the outcome of the first, and the other claims."""
    for _ in range(1 + waiting):
        await world.schedule(await world.sender())
    await world.loader.rebuild(world.queues[0])
    first, *others = (await world.queues[0].claim(1 + waiting)).claims
    async with statements.connect() as connection:
        [marked] = await mark_refs(connection, [first.job], LEASE)
    # A test's mark has begun a life of its own.
    return EndedAttempt(record_of(marked), LimitUse.COUNTED), others


async def transactions_of(world: World, *jobs: JobRef) -> set[str]:
    rows = await world.sql(
        "SELECT xmin::text AS xmin FROM email_jobs WHERE id = ANY(%s)", [j.job_id for j in jobs]
    )
    return {row.xmin for row in rows}


async def test_a_claim_takes_the_slot_of_a_send_in_the_statement_that_records_its_end(
    world: World, statements: AsyncEngine
) -> None:
    ended, [claim] = await one_sending(world, statements)
    slots = Slots(1, unproven=1)
    await slots.take_free()
    marks: list[asyncio.Future[list[object]]] = []

    def hand_over(number: int) -> None:
        if number:
            marks.append(settler.mark(world.queues[0], [claim]))  # type: ignore[arg-type]

    async with settling(world, statements, slots, hand_over) as settler:
        settler.settle(ended)
        await eventually(lambda: marks and marks[0].done())
    assert len(marks[0].result()) == 1
    assert (await world.job(ended.record.job.job_id)).state == JobState.SENT
    assert (await world.job(claim.job.job_id)).state == JobState.SENDING
    assert len(await transactions_of(world, ended.record.job, claim.job)) == 1


async def test_an_error_of_a_mark_does_not_keep_an_outcome_from_being_recorded(
    world: World, statements: AsyncEngine
) -> None:
    ended, [claim] = await one_sending(world, statements)
    slots = Slots(2, unproven=1)
    await slots.take_free()
    broken = replace(claim, job=JobRef(claim.job.job_id, 40_000))  # exceeds the column
    marks = []
    async with settling(
        world,
        statements,
        slots,
        lambda number: marks.append(settler.mark(world.queues[0], [broken])) if number else None,
    ) as settler:
        settler.settle(ended)
        await eventually(lambda: slots.in_flight == 0)
    with pytest.raises(psycopg.errors.NumericValueOutOfRange):
        await marks[0]
    assert (await world.job(ended.record.job.job_id)).state == JobState.SENT
    assert (await world.job(claim.job.job_id)).state == JobState.SCHEDULED


async def test_of_two_claims_of_a_job_one_is_marked(world: World, statements: AsyncEngine) -> None:
    """Both are possible after a loss of Redis, and may come in the same turn."""
    _, [claim] = await one_sending(world, statements)
    async with settling(world, statements, Slots(1, unproven=1), lambda _: None) as settler:
        both = [settler.mark(world.queues[0], [claim]) for _ in range(2)]
        marked = await asyncio.gather(*both)
    assert sorted(map(len, marked)) == [0, 1]


async def test_claims_of_two_lives_are_compared_each_with_its_own(
    world: World, statements: AsyncEngine
) -> None:
    _, [claim, other] = await one_sending(world, statements, waiting=2)
    old = replace(other, life="an earlier one")
    async with settling(world, statements, Slots(1, unproven=1), lambda _: None) as settler:
        marks = [settler.mark(world.queues[0], [each]) for each in (old, claim)]
        marked = await asyncio.gather(*marks)
    assert list(map(len, marked)) == [0, 1]
    assert (await world.job(other.job.job_id)).state == JobState.SCHEDULED


@asynccontextmanager
async def locked(world: World, job: JobRef) -> AsyncIterator[None]:
    url = world.settings.database_url
    async with await psycopg.AsyncConnection.connect(url) as connection:
        await connection.execute("SELECT FROM email_jobs WHERE id = %s FOR UPDATE", [job.job_id])
        yield
        await connection.rollback()


async def test_a_claim_gets_no_slot_of_a_send_whose_end_cannot_be_recorded(
    world: World, statements: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox_server.services.dispatcher.slots._LONGEST_AHEAD_S", 600.0)
    ended, claims = await one_sending(world, statements, waiting=2)
    slots = Slots(2, unproven=2)
    await slots.take_free()
    slots.release(1)
    marks: list[asyncio.Future[list[MarkedJob]]] = []
    async with settling(world, statements, slots, slots.hand_over) as settler:
        # Two claims wait while the only other slot is free: one takes it, one is handed over.
        for user, claim in zip(("anna", "bert"), claims, strict=True):

            def resume(_: object, claim: Claim = claim) -> None:
                marks.append(settler.mark(world.queues[0], [claim]))

            slots.wait([(relay(user), resume)], 600, slots=0)
        async with locked(world, ended.record.job):
            settler.settle(ended)
            await eventually(lambda: len(marks) == 2 and all(mark.done() for mark in marks))
            assert sum(len(mark.result()) for mark in marks) == 1
            assert len(await world.in_state(JobState.SENDING)) == slots.in_flight == 2
        await eventually(lambda: slots.in_flight == 1)
    assert (await world.job(ended.record.job.job_id)).state == JobState.SENT


async def someone_waits(world: World) -> bool:
    """Return whether a statement waits for a lock of a row."""
    return bool(await world.sql("SELECT pid FROM pg_locks WHERE NOT granted"))


async def test_a_locked_outcome_does_not_delay_the_marks_of_others(
    world: World, statements: AsyncEngine
) -> None:
    ended, [claim, later] = await one_sending(world, statements, waiting=2)
    slots = Slots(2, unproven=1)
    await slots.take_free()
    async with settling(world, statements, slots, lambda _: None) as settler:
        async with locked(world, ended.record.job):
            settler.settle(ended)
            together = settler.mark(world.queues[0], [claim])
            await eventually(lambda: someone_waits(world))
            alone = settler.mark(world.queues[0], [later])
            await eventually(lambda: together.done() and alone.done(), SOON)
            assert (len(together.result()), len(alone.result())) == (1, 1)
            assert (await world.job(ended.record.job.job_id)).state == JobState.SENDING
        await eventually(lambda: slots.in_flight == 1)
    assert (await world.job(ended.record.job.job_id)).state == JobState.SENT


async def test_a_pause_that_is_answered_while_a_row_is_locked_is_respected(
    world: World, statements: AsyncEngine
) -> None:
    ended, [claim] = await one_sending(world, statements)
    slots = Slots(1, unproven=1)
    await slots.take_free()
    async with settling(world, statements, slots, lambda _: None) as settler:
        async with locked(world, ended.record.job):
            settler.settle(ended)
            mark = settler.mark(world.queues[0], [claim])
            await eventually(lambda: someone_waits(world))
            # The mark is done, or it must see the pause.
            before = mark.done()
            await world.change(claim.sender_id, state=SenderState.PAUSED)
        await eventually(mark.done)
        assert before or mark.result() == []
        state = (await world.job(claim.job.job_id)).state
        assert state == (JobState.SENDING if before else JobState.SCHEDULED)
