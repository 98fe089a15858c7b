"""The settler's writes to Redis after interruptions of any kind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, cast

import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.dispatcher import settler as settler_module
from outbox_server.services.dispatcher.cooling import CooldownRules
from outbox_server.services.dispatcher.ended_claims import EndedAttempt, UnmarkedClaim, UnsentJob
from outbox_server.services.dispatcher.settler import Settler
from outbox_server.services.dispatcher.slots import Slots
from outbox_server.shared.queue.records import Claim, LimitUse
from outbox_server.shared.states import JobState, SenderState
from tests.dispatchers import options, settings_of
from tests.eventually import PATIENCE, eventually
from tests.lost_answers import LostAnswers
from tests.marked_jobs import mark_refs, record_of
from tests.world import World

LEASE = timedelta(minutes=1)
TOMORROW = timedelta(days=1)


@pytest_asyncio.fixture
async def world(database_url: str, redis_url: str) -> AsyncIterator[World]:
    settings = settings_of(options(database_url, redis_url, "smtp://127.0.0.1:1", lease="60s"))
    async with World(settings) as world:
        yield world


async def settle(
    world: World, statements: AsyncEngine, outcome: Any, transactions: Any = None
) -> None:
    """Let a settler write one outcome completely."""
    slots = Slots(1, unproven=2)
    await slots.take_free()
    engine = cast(AsyncEngine, transactions or world.engine)
    settler = Settler(
        statements,
        engine,
        world.loader,
        slots,
        CooldownRules.from_settings(world.settings),
    )
    if isinstance(outcome, UnmarkedClaim):
        slots.not_marked(1)
    settler.settle(outcome)
    settler.close()
    async with asyncio.timeout(PATIENCE):
        await settler.run()
    assert slots.in_flight == 0


async def claim_one(world: World) -> Claim:
    [claim] = (await world.queues[0].claim(1)).claims
    return claim


async def claim_before_tomorrows(world: World, sender: int) -> tuple[int, Claim]:
    """Claim the one due job of a sender; its other job is due much later."""
    [job] = await world.schedule(sender)
    await world.schedule(sender, due=TOMORROW)
    return job, await claim_one(world)


async def test_a_job_given_back_by_an_unanswered_commit_is_claimed_again(
    world: World, statements: AsyncEngine
) -> None:
    sender = await world.sender()
    job, claim = await claim_before_tomorrows(world, sender)
    async with statements.connect() as connection:
        [marked] = await mark_refs(connection, [claim.job], LEASE)

    lost = LostAnswers(world.engine)
    await settle(world, statements, UnsentJob(claim, marked), lost)

    assert lost.lost == 1
    assert (await world.job(job)).state == JobState.SCHEDULED
    # No recovery finds the job: its sender is known and waits for tomorrow's job.
    assert (await claim_one(world)).job == claim.job


async def test_an_unused_claim_does_not_make_the_next_one_late(
    world: World, statements: AsyncEngine
) -> None:
    await world.schedule(await world.sender())
    claim = await claim_one(world)
    await settle(world, statements, UnmarkedClaim(claim, waits=True))

    again = await claim_one(world)

    assert again.job == claim.job
    assert claim.waited <= again.waited < timedelta(minutes=5)


async def test_a_job_refused_in_a_pause_that_ends_before_redis_learns_of_it_is_claimed_again(
    world: World, statements: AsyncEngine
) -> None:
    sender = await world.sender()
    job, claim = await claim_before_tomorrows(world, sender)
    await world.change(sender, state=SenderState.PAUSED)
    async with statements.connect() as connection:
        assert await mark_refs(connection, [claim.job], LEASE) == []
    await world.change(sender, state=SenderState.ACTIVE)

    await settle(world, statements, UnmarkedClaim(claim))

    assert (await world.job(job)).state == JobState.SCHEDULED

    async def claimed() -> bool:
        # Every dispatcher does this every few seconds: it finds nothing lost.
        await world.loader.rebuild(world.queues[0])
        found = await world.queues[0].claim(1)
        await world.loader.load(found.loads, committed=False)
        return [each.job for each in found.claims] == [claim.job]

    await eventually(claimed)


@asynccontextmanager
async def settling_two(
    world: World, statements: AsyncEngine
) -> AsyncIterator[tuple[Settler, Slots, list[EndedAttempt]]]:
    """Run a settler, and yield the outcomes of two sends that began together."""
    await world.schedule(await world.sender(), 2)
    claims = (await world.queues[0].claim(2)).claims
    async with statements.connect() as connection:
        marked = await mark_refs(connection, [claim.job for claim in claims], LEASE)
    slots = Slots(2, unproven=2)
    await slots.take_free()
    rules = CooldownRules.from_settings(world.settings)
    settler = Settler(statements, world.engine, world.loader, slots, rules)
    settler.begin(job.job for job in marked)
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(settler.run())
        yield settler, slots, [EndedAttempt(record_of(job), LimitUse.COUNTED) for job in marked]
        settler.close()


async def transactions_of(world: World) -> set[str]:
    """Return the transactions that have recorded attempts."""
    return {row.xmin for row in await world.sql("SELECT xmin::text AS xmin FROM attempts")}


async def test_the_outcomes_of_sends_that_began_together_are_recorded_together(
    world: World, statements: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settler_module, "_PATIENCE_S", 10 * PATIENCE)
    async with settling_two(world, statements) as (settler, slots, (first, second)):
        settler.settle(first)
        for _ in range(5):
            assert await transactions_of(world) == set()
        settler.settle(second)
        await eventually(lambda: slots.in_flight == 0)
    assert len(await transactions_of(world)) == 1


async def test_an_outcome_does_not_wait_for_a_send_that_goes_on(
    world: World, statements: AsyncEngine
) -> None:
    async with settling_two(world, statements) as (settler, slots, (first, second)):
        settler.settle(first)
        await eventually(lambda: slots.in_flight == 1)
        assert len(await transactions_of(world)) == 1
        settler.settle(second)
        await eventually(lambda: slots.in_flight == 0)
    assert len(await transactions_of(world)) == 2


async def test_many_outcomes_do_not_wait_for_others(
    world: World, statements: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settler_module, "_PATIENCE_S", 10 * PATIENCE)
    monkeypatch.setattr(settler_module, "_ENOUGH", 0.5)  # of two slots
    async with settling_two(world, statements) as (settler, slots, (first, second)):
        settler.settle(first)
        await eventually(lambda: slots.in_flight == 1)
        settler.settle(second)
        await eventually(lambda: slots.in_flight == 0)
