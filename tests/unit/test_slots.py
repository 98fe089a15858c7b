"""What each user and endpoint may use of a dispatcher, on a clock that the test sets."""

from __future__ import annotations

import pytest

from outbox_server.services.dispatcher import shares as shares_module
from outbox_server.services.dispatcher import slots as slots_module
from outbox_server.services.dispatcher.shares import Permit, Route
from outbox_server.services.dispatcher.slots import Slots
from outbox_server.shared.queue.user_limits import UserLimit
from tests.clock import Clock
from tests.slot_steps import (
    NEW,
    QUICK,
    SLOW,
    relay,
    route,
    send,
    silent,
    take,
    take_all,
    wait,
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def slots(clock: Clock) -> Slots:
    return Slots(5, clock, unproven=4)


# The share of a user --------------------------------------------------------------------------


def test_one_user_alone_gets_all_slots_except_the_reserved_one(slots: Slots, clock: Clock) -> None:
    send(slots, clock, QUICK, 0.01)
    assert len(take_all(slots, QUICK)) == 4
    assert len(take_all(slots, relay("bert"))) == 4


@pytest.mark.parametrize(("total", "most"), [(1, 1), (2, 1), (3, 2), (5, 4), (20, 16)])
def test_a_fifth_of_the_slots_and_at_least_one_is_reserved(
    clock: Clock, total: int, most: int
) -> None:
    assert len(take_all(Slots(total, clock, unproven=2), relay("anna"), total)) == most


def test_quick_endpoints_get_no_more_than_the_share_of_their_user(
    slots: Slots, clock: Clock
) -> None:
    """Quick endpoints may all stop replying at the same time."""
    quick = [route(f"quick{number}.test", "eve") for number in range(3)]
    for each in quick:
        send(slots, clock, each, 0.01)
    assert sum(len(take_all(slots, each, 2)) for each in quick) == 4
    clock.now += 300
    assert slots.permit(relay("bert"))


def test_the_relay_is_slow_for_the_user_whose_mail_is_slow_there(
    slots: Slots, clock: Clock
) -> None:
    silent(slots, 4)
    send(slots, clock, relay("eve"), 2)
    clock.now += 300
    assert slots.permit(relay("eve")) is None
    assert slots.permit(relay("bert"))


def test_a_server_is_slow_for_the_user_whose_mail_is_slow_there(slots: Slots, clock: Clock) -> None:
    good, same_server = Route("1", "bert", "mail.test:25"), Route("2", "eve", "mail.test:25")
    send(slots, clock, good, 0.01)
    take_all(slots, same_server)
    clock.now += 300
    assert slots.permit(good)


# Endpoints that have not replied --------------------------------------------------------------


def test_endpoints_that_have_not_replied_get_few_slots_of_their_user(clock: Clock) -> None:
    slots = Slots(20, clock, unproven=2)
    silent = [route(f"silent{number}.test", "eve") for number in range(9)]
    assert sum(slots.permit(each) is not None for each in silent) == 2
    assert slots.permit(relay("eve"))
    assert len(take_all(slots, route("new.test", "bert"))) == 2


async def test_an_operator_gives_a_user_more_slots_for_endpoints_that_have_not_replied(
    clock: Clock,
) -> None:
    slots = Slots(20, clock, unproven=1)
    resumed: list[Permit | None] = []
    assert slots.permit(route("silent0.test", "eve"))
    assert await slots.take_free() == 20
    slots.wait([(route("silent1.test", "eve"), resumed.append)], 60)
    slots.release(19)
    assert slots.permit(route("silent2.test", "eve")) is None
    assert not resumed
    slots.set_unproven({"eve": 2})
    assert [permit is not None for permit in resumed] == [True]
    assert slots.permit(route("silent0.test", "bert"))
    assert slots.permit(route("silent1.test", "bert")) is None
    slots.close()


def test_an_endpoint_that_has_replied_is_no_longer_counted(clock: Clock) -> None:
    slots = Slots(20, clock, unproven=2)
    slow = route("slow.test", "eve")
    send(slots, clock, slow, 2)
    assert len(take_all(slots, slow, 9)) == 9


def test_an_endpoint_that_stops_replying_is_counted_again(clock: Clock) -> None:
    slots = Slots(20, clock, unproven=2)
    silent = route("silent.test", "eve")
    send(slots, clock, silent, 2)
    send(slots, clock, silent, 300, answered=False)
    assert len(take_all(slots, silent, 9)) == 2


# Slow endpoints -------------------------------------------------------------------------------


def test_an_endpoint_among_others_of_its_user_leaves_them_a_slot(
    slots: Slots, clock: Clock
) -> None:
    send(slots, clock, QUICK, 0.01)
    send(slots, clock, NEW, 0.01)
    assert len(take_all(slots, QUICK)) == 3
    assert slots.permit(NEW)


def test_no_slot_is_left_for_an_endpoint_that_is_no_longer_used(slots: Slots, clock: Clock) -> None:
    send(slots, clock, NEW, 0.01)
    clock.now += 61
    send(slots, clock, QUICK, 0.01)
    assert len(take_all(slots, QUICK)) == 4


def test_slow_endpoints_of_a_user_leave_a_slot_to_the_quick_ones(
    slots: Slots, clock: Clock
) -> None:
    send(slots, clock, SLOW, 2)
    send(slots, clock, NEW, 2)
    send(slots, clock, QUICK, 0.01)
    assert len(take_all(slots, SLOW)) + len(take_all(slots, NEW)) == 3
    assert slots.permit(QUICK)


def test_slow_endpoints_of_all_users_leave_the_reserved_slot_free(
    slots: Slots, clock: Clock
) -> None:
    """An endpoint of which nothing is known is slow, and gets no reserved slot either."""
    users = ("anna", "bert", "carl", "dora", "eve")
    permits = [slots.permit(route(f"silent.{user}", user)) for user in users]
    assert [permit is not None for permit in permits] == [True] * 4 + [False]
    clock.now += 300
    assert slots.permit(relay("eve"))


def test_half_of_several_reserved_slots_go_to_slow_endpoints_of_users_who_have_none(
    clock: Clock,
) -> None:
    slots = Slots(20, clock, unproven=5)
    send(slots, clock, relay("bert"), 0.01)
    silent = [route(f"silent{number}.test", f"eve{number}") for number in range(30)]
    assert sum(slots.permit(each) is not None for each in silent) == 18
    clock.now += 300
    assert slots.permit(relay("bert"))


def test_an_endpoint_is_slow_as_soon_as_a_send_takes_long(slots: Slots, clock: Clock) -> None:
    send(slots, clock, QUICK, 0.01)
    send(slots, clock, NEW, 0.01)
    held = take_all(slots, QUICK, 3)
    clock.now += 2
    assert slots.permit(QUICK) is None
    assert slots.permit(NEW)
    for permit in held:
        slots.end(permit)
    silent(slots, 4)
    assert slots.permit(QUICK) is None  # the last one was slow, so no reserved slot
    assert slots.permit(NEW)


def test_a_permit_that_was_not_used_says_nothing_about_the_endpoint(
    slots: Slots, clock: Clock
) -> None:
    send(slots, clock, QUICK, 0.01)
    permit = slots.permit(QUICK)
    assert permit is not None
    clock.now += 5
    slots.end(permit, sent=False)
    silent(slots, 4)
    assert slots.permit(QUICK)  # the reserved slot


# What claims may take of a user ---------------------------------------------------------------


def test_a_user_who_holds_little_is_not_limited(slots: Slots) -> None:
    slots.permit(relay("anna"))
    assert slots.limits(3) == []


def test_a_claim_may_take_no_more_of_a_user_than_the_share_leaves(slots: Slots) -> None:
    take_all(slots, relay("eve"), 3)
    assert slots.limits(2) == [UserLimit("eve", first=1, most=1)]
    take_all(slots, relay("eve"))
    assert slots.limits(1) == [UserLimit("eve", first=0, most=0)]


def test_the_users_who_have_less_come_first(clock: Clock) -> None:
    slots = Slots(10, clock, unproven=2)
    take_all(slots, relay("eve"), 6)
    take_all(slots, relay("bert"), 1)
    assert slots.limits(3) == [UserLimit("eve", first=0, most=2)]


def test_claims_whose_route_is_not_known_count_for_their_user(slots: Slots) -> None:
    unknown = take_all(slots, Route("", "eve"))
    assert len(unknown) == 4
    assert slots.limits(1) == [UserLimit("eve", first=0, most=0)]
    for permit in unknown:
        slots.end(permit, sent=False)
    assert slots.limits(4) == []


async def test_no_more_jobs_are_claimed_of_a_user_for_whom_very_many_wait(
    slots: Slots, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "MAX_WAITING_OF_USER", 3)
    send(slots, clock, SLOW, 2)
    take_all(slots, SLOW)
    await take(slots, 4)
    waits = [each for _ in range(3) for each in await wait(slots, SLOW)]
    assert slots.limits(1) == [UserLimit("anna", first=0, most=0)]
    slots.close()
    assert all(each.ended for each in waits)


def test_a_claim_is_tried_again_once_a_limited_user_has_room(clock: Clock) -> None:
    woken: list[bool] = []
    slots = Slots(5, clock, unproven=2, on_room=lambda: woken.append(True))
    [first, *_] = take_all(slots, relay("eve"))
    other = slots.permit(relay("bert"))
    assert other is not None
    slots.limited(0, slots.limits(1))
    slots.limited(1, [])
    slots.end(other)
    assert not woken
    slots.end(first)
    assert not woken  # its outcome is not recorded yet, and others may end together with it
    slots.settled(1)
    assert woken
    slots.limited(0, [])
    woken.clear()
    for permit in take_all(slots, relay("eve")):
        slots.end(permit)
    slots.settled(4)
    assert not woken


# Remembered routes ---------------------------------------------------------------------------


def test_the_last_route_of_a_sender_is_remembered(slots: Slots) -> None:
    assert slots.route_of(7) is None
    slots.learn(7, SLOW)
    slots.learn(7, QUICK)
    assert slots.route_of(7) == QUICK


def test_the_memory_of_routes_endpoints_and_users_is_limited(
    slots: Slots, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "_MAX_SENDERS", 3)
    for limit in ("_MAX_ENDPOINTS", "_MAX_USERS"):
        monkeypatch.setattr(shares_module, limit, 3)
    held = slots.permit(route("held", "user"))
    for number in range(9):
        each = route(f"{number}.test", f"user{number}")
        slots.learn(number, each)
        send(slots, clock, each, 0.01)
    assert [number for number in range(9) if slots.route_of(number)] == [6, 7, 8]
    assert held is not None
    slots.end(held)
    assert len(slots._shares._endpoints) <= 3
    assert len(slots._shares._users) <= 4
