"""The settler's writes to Redis after interruptions of any kind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, cast

import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.dispatcher.cooling import CooldownRules
from outbox_server.services.dispatcher.settler import Settler, UnmarkedClaim, UnsentJob
from outbox_server.services.dispatcher.slots import Slots
from outbox_server.shared.queue.records import Claim
from outbox_server.shared.states import JobState, SenderState
from tests.dispatchers import options, settings_of
from tests.eventually import PATIENCE, eventually
from tests.lost_answers import LostAnswers
from tests.marked_jobs import mark_refs
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
