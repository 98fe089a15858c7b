"""Turns of the calls of a user, beside those of others."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from outbox_server.shared import recent_callers
from outbox_server.shared import turns as turns_module
from outbox_server.shared.fair_shares import NOBODY, Claimant
from outbox_server.shared.turns import ALONE, AT_ONCE, Turn, Turns
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


async def steps(count: int) -> None:
    """Let every task run that is ready, as often as `count` says."""
    for _ in range(count):
        await asyncio.sleep(0)


async def visit(turns: Turns, claimant: Claimant = ANN) -> None:
    """Make one call that ends at once."""
    async with turns.entered(claimant):
        pass


async def test_a_user_who_calls_alone_runs_a_few_calls_at_a_time(calls: Calls) -> None:
    await visit(calls.turns, EVE)
    await calls.start(MANY)
    assert (len(calls.running), calls.turns.waiting) == (ALONE, MANY - ALONE)
    await calls.finish()
    assert (calls.running, calls.turns.waiting) == ([], 0)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no time pass, however busy the machine is."""
    monkeypatch.setattr(recent_callers, "_PRESENT_S", 3600.0)
    for name in ("_COUNTS_S", "_GIVES_WAY_S"):
        monkeypatch.setattr(turns_module, name, 3600.0)


@pytest.mark.usefixtures("patient")
async def test_calls_that_had_to_wait_give_way_to_those_that_had_not(calls: Calls) -> None:
    await visit(calls.turns)
    await calls.start(MANY)
    async with calls.turns.entered(ANN):
        calls.running[0].leave()
        await steps(MANY)
        assert (len(calls.running), calls.turns.waiting) == (1, MANY - 1)
        # A call of a user with few calls waits for none of this.
        await visit(calls.turns, Claimant("bob"))
    await steps(1)
    assert (len(calls.running), calls.turns.waiting) == (2, MANY - 2)
    await calls.finish()
    assert not calls.turns._users
    assert not calls.turns._prompt


@pytest.mark.usefixtures("patient")
async def test_calls_give_way_while_calls_arrive(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns_module, "_ARRIVES_S", 3600.0)
    bob = Claimant("bob")
    await visit(calls.turns)
    await calls.start(MANY)
    calls.turns.note_arrival(ANN)
    calls.running[0].leave()
    await steps(MANY)
    assert (len(calls.running), calls.turns.waiting) == (1, MANY - 1)
    # Calls of users with few calls do not.
    await visit(calls.turns, bob)
    assert (len(calls.running), calls.turns.waiting) == (1, MANY - 1)
    monkeypatch.setattr(turns_module, "_ARRIVES_S", 0.0)
    await visit(calls.turns, bob)
    await steps(1)
    assert (len(calls.running), calls.turns.waiting) == (2, MANY - 2)
    await calls.finish()


async def test_nobody_gives_way_for_long(calls: Calls) -> None:
    await visit(calls.turns)
    await calls.start(2)
    async with calls.turns.entered(ANN):
        calls.running[0].leave()
        parts = [asyncio.create_task(calls.turns.next_part(EVE)) for _ in range(2)]
        await eventually(lambda: len(calls.running) == 2)
        await asyncio.gather(*parts)
    await calls.finish()


@pytest.mark.usefixtures("patient")
async def test_calls_give_way_to_one_that_pauses(calls: Calls) -> None:
    await visit(calls.turns)
    await calls.start(MANY)
    async with calls.turns.entered(ANN) as turn:
        turn.pause()
        calls.running[0].leave()
        await steps(MANY)
        assert len(calls.running) == 1
        await turn.take()
        turn.pause()
        await steps(MANY)
        assert len(calls.running) == 1
    await steps(1)
    assert len(calls.running) == 2
    await calls.finish()
    assert not calls.turns._prompt


@pytest.mark.usefixtures("patient")
async def test_nobody_is_slower_because_an_operator_calls(calls: Calls) -> None:
    await visit(calls.turns, EVE)
    await visit(calls.turns, Claimant("1", "operator key", privileged=True))
    await calls.start(MANY)
    assert len(calls.running) == ALONE
    await calls.finish()


@pytest.mark.usefixtures("patient")
async def test_parts_of_long_work_give_way_and_run_one_by_one(calls: Calls) -> None:
    turns, done = calls.turns, list[int]()

    async def work() -> None:
        await turns.next_part(EVE)
        done.append(rounds)

    rounds = 0
    async with turns.entered(ANN):
        parts = [asyncio.create_task(work()) for _ in range(3)]
        await steps(MANY)
        assert not done
        # Work of a server's own, and of services, only lets others run.
        await turns.next_part(NOBODY)
        await turns.next_part(Claimant("1", "service key"))
    while len(done) < 3:
        rounds += 1
        await steps(1)
    # No two of them in one round of the event loop.
    assert len(set(done)) == 3
    await asyncio.gather(*parts)
    await eventually(lambda: not turns._parts)


@pytest.mark.usefixtures("patient")
async def test_a_part_that_is_cancelled_lets_the_next_one_run(calls: Calls) -> None:
    turns = calls.turns
    async with turns.entered(ANN):
        parts = [asyncio.create_task(turns.next_part(EVE)) for _ in range(3)]
        await steps(2)
        for part in parts[:2]:
            part.cancel()
            await steps(2)
    await parts[2]
    await eventually(lambda: not turns._parts)
    assert not turns._giving_way


async def test_a_call_may_take_its_turn_again(calls: Calls) -> None:
    async with calls.turns.entered(EVE) as turn:
        turn.pause()
        await visit(calls.turns)
        await calls.start(2)
        again = asyncio.create_task(turn.take())
        await steps(2)
        assert not again.done()
        calls.end.set()
        await again
    assert not calls.turns._users


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


@pytest.mark.usefixtures("patient")
async def test_a_user_with_many_calls_in_progress_gives_way_although_none_of_them_runs(
    calls: Calls,
) -> None:
    turns = calls.turns
    async with AsyncExitStack() as stack:
        for _ in range(4):
            # They wait for the group of their batches, for example.
            (await stack.enter_async_context(turns.entered(EVE))).pause()
        async with turns.entered(ANN):
            await calls.start(1)
            assert not calls.running
        await steps(1)
        assert len(calls.running) == 1
        # One of few calls does not.
        for _ in range(2):
            async with turns.entered(ANN):
                await calls.start(1, Claimant("bob"))
                assert calls.running[-1].claimant == Claimant("bob")
                calls.running[-1].leave()
        await calls.finish()
    assert not turns._users


async def test_calls_give_way_for_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    turns = Turns()
    await visit(turns)
    first, second, third, fourth, *_ = [begun(turns, EVE) for _ in range(6)]
    hers = begun(turns, ANN)
    first.leave()
    assert not runs(turns, second)
    now += 0.011
    turns._serve(EVE)
    assert runs(turns, second)
    second.leave()
    assert runs(turns, third)
    now += 0.01
    third.leave()
    assert not runs(turns, fourth)
    hers.leave()
    assert runs(turns, fourth)


def begun(turns: Turns, claimant: Claimant) -> Turn:
    """Begin a call, or let it wait."""
    turn = Turn(turns, claimant)
    turns.begin(turn)
    return turn


def runs(turns: Turns, turn: Turn) -> bool:
    return turn in turns._users[turn.claimant].running
