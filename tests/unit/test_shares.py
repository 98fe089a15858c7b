from __future__ import annotations

import asyncio

import pytest

from services.dispatcher.shares import EndpointKey, Place, Shares

SLOW, QUICK, NEW = ("slow.test", 25), ("quick.test", 25), ("new.test", 25)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shares(clock: Clock) -> Shares:
    return Shares(5, clock)


def take_all(shares: Shares, key: EndpointKey, most: int = 5) -> list[Place]:
    places: list[Place] = []
    while len(places) < most and (place := shares.take(key)):
        places.append(place)
    return places


def send(shares: Shares, clock: Clock, key: EndpointKey, seconds: float) -> None:
    place = shares.take(key)
    assert place is not None
    clock.now += seconds
    shares.leave(place)


def test_a_quick_endpoint_that_is_alone_has_all_places(shares: Shares, clock: Clock) -> None:
    send(shares, clock, QUICK, 0.01)
    assert len(take_all(shares, QUICK)) == 5


def test_a_quick_endpoint_among_others_leaves_a_place(shares: Shares, clock: Clock) -> None:
    send(shares, clock, QUICK, 0.01)
    send(shares, clock, NEW, 0.01)
    assert len(take_all(shares, QUICK)) == 4
    assert shares.take(NEW)


def test_an_endpoint_that_is_not_used_any_more_is_nobody_to_keep_places_for(
    shares: Shares, clock: Clock
) -> None:
    send(shares, clock, NEW, 0.01)
    clock.now += 61
    send(shares, clock, QUICK, 0.01)
    assert len(take_all(shares, QUICK)) == 5


def test_an_endpoint_that_has_never_answered_leaves_a_place(shares: Shares) -> None:
    assert len(take_all(shares, SLOW)) == 4
    assert shares.take(NEW)


def test_slow_endpoints_together_leave_a_place(shares: Shares, clock: Clock) -> None:
    send(shares, clock, SLOW, 2)
    send(shares, clock, NEW, 2)
    send(shares, clock, QUICK, 0.01)
    assert len(take_all(shares, SLOW)) + len(take_all(shares, NEW)) == 4
    assert shares.take(QUICK)


def test_an_endpoint_is_slow_as_soon_as_a_send_takes_long(shares: Shares, clock: Clock) -> None:
    send(shares, clock, QUICK, 0.01)
    held = take_all(shares, QUICK, 4)
    clock.now += 2
    assert shares.take(QUICK) is None
    for place in held:
        shares.leave(place)
    assert len(take_all(shares, QUICK)) == 4  # the last one was slow
    assert shares.take(NEW)


def test_a_place_that_was_not_used_says_nothing_of_the_endpoint(
    shares: Shares, clock: Clock
) -> None:
    send(shares, clock, QUICK, 0.01)
    place = shares.take(QUICK)
    assert place is not None
    clock.now += 5
    shares.leave(place, sent=False)
    assert len(take_all(shares, QUICK)) == 5


def test_one_place_alone_is_anybodys(clock: Clock) -> None:
    shares = Shares(1, clock)
    send(shares, clock, SLOW, 5)
    assert shares.take(SLOW)


async def test_places_go_to_those_that_wait_in_turn_and_to_each_endpoint(
    shares: Shares, clock: Clock
) -> None:
    send(shares, clock, SLOW, 2)
    send(shares, clock, NEW, 2)
    held = take_all(shares, SLOW)
    until = asyncio.get_running_loop().time() + 30
    first, second = shares.wait(SLOW, until), shares.wait(SLOW, until)
    other = shares.wait(NEW, until)
    assert not shares.hand_over()
    assert shares.take(SLOW) is None
    for place in held[:2]:
        shares.leave(place)
        assert shares.hand_over()
    assert (first.done(), second.done(), other.done()) == (True, False, True)
    shares.give_up()
    assert await second is None


async def test_a_wait_has_an_end(shares: Shares) -> None:
    turn = shares.wait(SLOW, asyncio.get_running_loop().time() + 0.01)
    assert await turn is None
    assert shares.waiting == 1
    shares.stop_waiting()
    assert shares.waiting == 0
