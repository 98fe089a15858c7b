"""Turns of the calls of a user, beside those of others."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from outbox_server.shared.fair_shares import Claimant
from outbox_server.shared.turns import AT_ONCE, Turn, Turns
from tests.eventually import eventually

ANN = Claimant("ann")
EVE = Claimant("eve")
MANY = 10


class Calls:
    """Calls that begin when they get a turn, and end when they are told."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.running: list[Turn] = []
        self.end = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self, count: int, claimant: Claimant = EVE) -> None:
        self.tasks += [asyncio.create_task(self.call(claimant)) for _ in range(count)]
        # Each of them runs until it waits.
        await asyncio.sleep(0)

    async def call(self, claimant: Claimant) -> None:
        async with self.turns.entered(claimant) as turn:
            self.running.append(turn)
            await self.end.wait()
        self.running.remove(turn)

    async def finish(self) -> None:
        self.end.set()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
async def calls() -> Calls:
    return Calls(Turns())


async def visit(turns: Turns, claimant: Claimant = ANN) -> None:
    """Make one call that ends at once."""
    async with turns.entered(claimant):
        pass


async def test_a_user_who_calls_alone_waits_for_nothing(calls: Calls) -> None:
    await visit(calls.turns, EVE)
    await calls.start(MANY)
    assert len(calls.running) == MANY
    await calls.finish()


@pytest.mark.parametrize("other", [ANN, Claimant("1", "service key"), Claimant("", "local caller")])
async def test_beside_another_caller_a_user_runs_one_call_at_a_time(
    calls: Calls, other: Claimant
) -> None:
    await visit(calls.turns, other)
    await calls.start(MANY)
    assert (len(calls.running), calls.turns.waiting) == (AT_ONCE, MANY - AT_ONCE)
    await calls.finish()
    assert (calls.running, calls.turns.waiting) == ([], 0)


async def test_the_other_caller_waits_for_none_of_them(calls: Calls) -> None:
    await visit(calls.turns)
    await calls.start(MANY)
    await calls.start(1, ANN)
    assert len(calls.running) == AT_ONCE + 1
    await calls.finish()


async def test_calls_that_have_run_for_a_while_do_not_count(calls: Calls) -> None:
    await visit(calls.turns)
    await calls.start(MANY)
    await eventually(lambda: len(calls.running) == MANY)
    await calls.finish()


@pytest.mark.parametrize(
    "claimant",
    [Claimant("1", "service key"), Claimant("1", "operator key", privileged=True)],
    ids=str,
)
async def test_services_and_operators_wait_for_nothing(calls: Calls, claimant: Claimant) -> None:
    await visit(calls.turns)
    await calls.start(MANY, claimant)
    assert len(calls.running) == MANY
    await calls.finish()


async def test_a_call_that_only_waits_lets_another_one_run(calls: Calls) -> None:
    await visit(calls.turns)
    await calls.start(AT_ONCE + 1)
    calls.running[0].leave()
    await eventually(lambda: len(calls.running) == AT_ONCE + 1, deadline=0.05)
    await calls.finish()


async def test_calls_that_are_cancelled_while_they_wait_leave_nothing_behind(calls: Calls) -> None:
    await visit(calls.turns)
    await calls.start(MANY)
    for task in calls.tasks[AT_ONCE:]:
        task.cancel()
    await calls.finish()
    assert not calls.turns._users


async def test_a_call_that_is_cancelled_when_it_gets_its_turn_gives_it_on(calls: Calls) -> None:
    turns = Turns(at_once=1)
    calls.turns = turns
    await visit(turns)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(turns.entered(EVE))
        await calls.start(2)
    # The first one was served just now, and has not run yet.
    calls.tasks[0].cancel()
    await eventually(lambda: len(calls.running) == 1, deadline=0.05)
    await calls.finish()
    assert not turns._users
