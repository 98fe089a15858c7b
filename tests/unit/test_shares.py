from __future__ import annotations

import asyncio

import pytest

from services.dispatcher.shares import MOST_WAITING, Place, Route, Shares

SLOW, QUICK, NEW = (Route((f"{name}.test", 25), "anna") for name in ("slow", "quick", "new"))


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


def take_all(shares: Shares, route: Route, most: int = 5) -> list[Place]:
    places: list[Place] = []
    while len(places) < most and (place := shares.take(route)):
        places.append(place)
    return places


def send(shares: Shares, clock: Clock, route: Route, seconds: float) -> None:
    place = shares.take(route)
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


def route(host: str, user: str) -> Route:
    return Route((host, 25), user)


def test_endpoints_that_never_answer_hold_no_more_than_the_share_of_their_user(
    shares: Shares,
) -> None:
    assert shares.take(route("good.test", "bert"))
    held = [shares.take(route(f"silent{number}.test", "eve")) for number in range(9)]
    assert sum(place is not None for place in held) == 3  # with the other one, the share
    assert shares.take(route("new.test", "carl"))


def test_quick_endpoints_hold_no_more_than_the_share_of_their_user(
    shares: Shares, clock: Clock
) -> None:
    """They may all hang at once."""
    quick = [route(f"quick{number}.test", "eve") for number in range(3)]
    for each in quick:
        send(shares, clock, each, 0.01)
    good = route("good.test", "bert")
    send(shares, clock, good, 0.01)
    assert sum(len(take_all(shares, each, 2)) for each in quick) == 4
    clock.now += 300
    assert shares.take(good)


def test_many_users_with_endpoints_that_never_answer_leave_places_to_quick_ones(
    clock: Clock,
) -> None:
    shares = Shares(20, clock)
    good = route("good.test", "bert")
    send(shares, clock, good, 0.01)
    silent = [route(f"silent{number}.test", f"eve{number}") for number in range(30)]
    assert sum(shares.take(each) is not None for each in silent) == 18
    clock.now += 300
    assert shares.take(good)


def test_a_user_with_a_slow_endpoint_has_a_place_beside_one_who_holds_the_share(
    clock: Clock,
) -> None:
    shares = Shares(20, clock)
    slow = route("slow.test", "bert")
    send(shares, clock, slow, 2)
    assert len(take_all(shares, route("silent.test", "eve"), 20)) == 16
    assert len(take_all(shares, slow, 20)) == 1


async def test_a_place_goes_to_the_user_who_has_the_fewest(shares: Shares, clock: Clock) -> None:
    eve, bert = (route("relay.test", user) for user in ("eve", "bert"))
    send(shares, clock, eve, 2)
    held = take_all(shares, eve)
    until = asyncio.get_running_loop().time() + 30
    of_eve, of_bert = shares.wait(eve, until), shares.wait(bert, until)
    assert not shares.hand_over()
    shares.leave(held[0])
    assert shares.hand_over()
    assert (of_eve.done(), of_bert.done()) == (False, True)
    shares.give_up()


async def test_a_place_is_kept_although_very_many_wait(shares: Shares, clock: Clock) -> None:
    send(shares, clock, SLOW, 2)
    take_all(shares, SLOW)
    until = asyncio.get_running_loop().time() + 30
    for _ in range(MOST_WAITING):
        shares.wait(SLOW, until)
    assert shares.full
    assert shares.take(SLOW) is None
    assert not shares.hand_over()
    shares.give_up()


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
