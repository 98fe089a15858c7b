from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_server.shared.errors import ResourceExhausted
from outbox_server.shared.fair_shares import NOBODY, Claimant, FairShares
from tests.eventually import PATIENCE, eventually

SOON = timedelta(milliseconds=20)
LATER = timedelta(seconds=30)
ANN = Claimant("ann")
EVE = Claimant("eve")
OPERATOR = Claimant("k2", "operator's key", privileged=True)


def taken_by(shares: FairShares, claimant: Claimant) -> int:
    """Take places until the next one is refused."""
    while shares.try_take(claimant):
        pass
    return shares.held_by(claimant)


class Crowd:
    """Holds places until it is released."""

    def __init__(self, shares: FairShares) -> None:
        self.shares = shares
        self.inside = 0
        self.most = 0
        self.order: list[Claimant] = []
        self.go = asyncio.Event()

    async def enter(self, claimant: Claimant = NOBODY) -> None:
        async with self.shares.entered(claimant):
            self.order.append(claimant)
            self.inside += 1
            self.most = max(self.most, self.inside)
            await self.go.wait()
            self.inside -= 1


def entered(crowd: Crowd, count: int) -> bool:
    return len(crowd.order) == count


@asynccontextmanager
async def waiting(crowd: Crowd, claimants: Sequence[Claimant]) -> AsyncIterator[None]:
    """Let claimants wait in this order, and all leave at the end."""
    tasks = []
    for claimant in claimants:
        tasks.append(asyncio.create_task(crowd.enter(claimant)))
        await asyncio.sleep(0)  # in this order
    await eventually(lambda: crowd.shares.waiting == len(claimants))
    yield
    crowd.go.set()
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*tasks)


@pytest.mark.parametrize(
    ("capacity", "alone"), [(64, 45), (16, 12), (1_000, 704), (4, 3), (3, 2), (2, 1), (1, 1)]
)
def test_one_user_alone_gets_all_places_but_a_reserve(capacity: int, alone: int) -> None:
    assert taken_by(FairShares("calls", capacity), EVE) == alone


def test_users_who_come_later_find_places_however_many_the_first_took() -> None:
    shares = FairShares("calls", 64)
    held = [taken_by(shares, Claimant(f"eve {n}")) for n in range(4)]
    assert held == sorted(held, reverse=True)
    assert all(held)


async def test_users_who_want_all_places_end_with_equal_shares() -> None:
    shares = FairShares("calls", 64, waiting=1_000, patience=LATER)
    tasks = []
    for claimant in (EVE, ANN):
        taken_by(shares, claimant)
        tasks += [asyncio.create_task(shares.take(claimant)) for _ in range(200)]
    await eventually(lambda: shares.waiting == 400)
    for n in range(100):
        # The calls of both end in turn.
        shares.give_back((EVE, ANN)[n % 2])
        await asyncio.sleep(0)
    assert abs(shares.held_by(ANN) - shares.held_by(EVE)) <= 1
    assert shares.in_use > 48
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_operators_get_in_when_users_have_filled_everything() -> None:
    shares = FairShares("calls", 64)
    for n in range(200):
        taken_by(shares, Claimant(f"eve {n}"))
    assert shares.in_use == 60
    assert taken_by(shares, OPERATOR) == 4


def test_the_only_caller_of_a_server_without_keys_gets_every_place() -> None:
    shares = FairShares("calls", 64)
    assert taken_by(shares, Claimant("", "local caller", privileged=True)) == 64


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), max_size=200),
)
def test_a_user_without_a_place_is_refused_only_if_no_place_is_free(
    capacity: int, steps: list[tuple[str, bool]]
) -> None:
    shares = FairShares("calls", capacity, operators=0)
    held: dict[str, int] = dict.fromkeys("abcde", 0)
    for name, takes in steps:
        if takes and shares.try_take(Claimant(name)):
            held[name] += 1
        elif takes:
            assert held[name] or sum(held.values()) == capacity
        elif held[name]:
            shares.give_back(Claimant(name))
            held[name] -= 1
        assert {each: shares.held_by(Claimant(each)) for each in held} == held
        assert shares.in_use == sum(held.values()) <= capacity


async def test_no_more_than_the_capacity_are_inside_and_all_who_wait_get_in() -> None:
    crowd = Crowd(FairShares("calls", 3, waiting=7, patience=LATER))
    async with asyncio.TaskGroup() as group:
        for _ in range(10):
            group.create_task(crowd.enter())
        await eventually(lambda: crowd.inside == 3)
        crowd.go.set()
    assert crowd.most == 3
    assert (crowd.shares.in_use, crowd.shares.waiting) == (0, 0)


async def test_a_free_place_goes_to_whoever_holds_the_fewest() -> None:
    shares = FairShares("calls", 4, waiting=100, patience=LATER, operators=0)
    for claimant in (EVE, EVE, EVE, ANN):
        assert shares.try_take(claimant)
    crowd = Crowd(shares)
    bob = Claimant("bob")
    async with waiting(crowd, [EVE, EVE, ANN, bob, OPERATOR]):
        for count in range(1, 4):
            shares.give_back(EVE)
            await eventually(partial(entered, crowd, count))
        # In the end Eve holds none, and Ann one.
        assert crowd.order == [OPERATOR, bob, EVE]
        shares.give_back(ANN)
    assert len(crowd.order) == 5


async def test_users_with_equally_many_places_take_turns() -> None:
    shares = FairShares("calls", 1, waiting=100, patience=LATER)
    assert shares.try_take(ANN)
    crowd = Crowd(shares)
    crowd.go.set()
    async with waiting(crowd, [EVE, EVE, EVE, ANN, ANN]):
        shares.give_back(ANN)
    assert crowd.order == [EVE, ANN, EVE, ANN, EVE]


async def test_one_user_cannot_fill_the_line() -> None:
    shares = FairShares("calls", 8, waiting=8, patience=LATER)
    taken_by(shares, EVE)
    crowd = Crowd(shares)
    async with waiting(crowd, [EVE] * 6):
        with pytest.raises(
            ResourceExhausted, match=r"eve has reached its share .* 6 wait"
        ) as caught:
            await shares.take(EVE)
        assert caught.value.metadata["limit_of"] == "user eve"
        assert caught.value.metadata["current"] == "6"
        taken_by(shares, ANN)
        async with asyncio.TaskGroup() as group:
            group.create_task(crowd.enter(ANN))
            await eventually(lambda: shares.waiting == 7)
            crowd.go.set()
            for _ in range(6):
                shares.give_back(EVE)
            shares.give_back(ANN)


async def test_the_refusal_of_a_full_server_says_so() -> None:
    shares = FairShares("uploads", 4)
    for name in "abcd":
        assert shares.try_take(Claimant(name))
    with pytest.raises(ResourceExhausted, match=r"all uploads of this .*: 4") as caught:
        await shares.take(ANN)
    assert caught.value.reason == "TOO_MANY_CALLS"
    assert caught.value.metadata["limit_of"] == "server"
    assert caught.value.retry_after > timedelta(0)


async def test_a_wait_times_out_and_leaves_no_trace() -> None:
    shares = FairShares("calls", 1, waiting=1, patience=SOON)
    assert shares.try_take(ANN)
    for _ in range(3):  # the line is empty again
        with pytest.raises(ResourceExhausted, match=r"none became free within 0\.02 s"):
            await shares.take(EVE)
    shares.give_back(ANN)
    assert shares.try_take(EVE)


async def test_a_cancelled_wait_takes_no_place() -> None:
    shares = FairShares("calls", 1, waiting=5, patience=LATER)
    assert shares.try_take(ANN)
    tasks = [asyncio.create_task(shares.take(EVE)) for _ in range(3)]
    await eventually(lambda: shares.waiting == 3)
    tasks[0].cancel()
    # The first wait is cancelled, but its task has not noticed it yet.
    shares.give_back(ANN)
    # The second one has the place, and is cancelled before it can use it.
    tasks[1].cancel()
    await eventually(tasks[2].done)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [task.cancelled() for task in tasks] == [True, True, False]
    assert (shares.in_use, shares.held_by(EVE), shares.waiting) == (1, 1, 0)


async def test_a_refusal_says_that_the_waiting_line_of_the_server_is_full() -> None:
    shares = FairShares("calls", 4, waiting=4, patience=LATER)
    crowd = Crowd(shares)
    names = [Claimant(name) for name in "abcdefgh"]
    for name in names[:4]:
        assert shares.try_take(name)
    async with waiting(crowd, names[4:]):
        # She has neither a place nor a place in the line: her share is not the limit.
        with pytest.raises(ResourceExhausted, match=r"all calls of this .* 4 wait") as caught:
            await shares.take(ANN)
        assert caught.value.metadata["limit_of"] == "server"
        crowd.go.set()
        for name in names[:4]:
            shares.give_back(name)


async def test_a_place_that_is_left_early_is_given_back_once() -> None:
    shares = FairShares("calls", 1)
    async with shares.entered(ANN) as place:
        assert not shares.try_take(EVE)
        place.leave()
        assert shares.try_take(EVE)
    assert shares.in_use == 1
