"""The capacity of a dispatcher, on a clock that the test sets."""

from __future__ import annotations

import asyncio

import pytest

from outbox_server.services.dispatcher import shares as shares_module
from outbox_server.services.dispatcher import slots as slots_module
from outbox_server.services.dispatcher.shares import Permit, Route
from outbox_server.services.dispatcher.slots import Slots
from outbox_server.shared.queue.user_limits import UserLimit

SLOW, QUICK, NEW = (Route(f"{name}.test", "anna") for name in ("slow", "quick", "new"))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def slots(clock: Clock) -> Slots:
    return Slots(5, clock, unproven=4)


def take_all(slots: Slots, route: Route, most: int = 5) -> list[Permit]:
    permits: list[Permit] = []
    while len(permits) < most and (permit := slots.permit(route)):
        permits.append(permit)
    return permits


def send(
    slots: Slots, clock: Clock, route: Route, seconds: float, *, answered: bool = True
) -> None:
    permit = slots.permit(route)
    assert permit is not None
    clock.now += seconds
    slots.end(permit, answered=answered)


def route(host: str, user: str) -> Route:
    return Route(f"{host} of {user}", user)


def silent(slots: Slots, number: int) -> list[Permit]:
    """Let users wait for servers that do not reply, one each."""
    permits = [slots.permit(route("silent.test", f"user{each}")) for each in range(number)]
    assert None not in permits
    return [permit for permit in permits if permit]


def relay(user: str) -> Route:
    return Route(f"relay:{user}", user, relay=True)


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
    for _ in range(4):
        slots.begin_unrouted("eve")
    assert slots.limits(1) == [UserLimit("eve", first=0, most=0)]
    for _ in range(4):
        slots.end_unrouted("eve")
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
    assert woken
    slots.limited(0, [])
    woken.clear()
    for permit in take_all(slots, relay("eve")):
        slots.end(permit)
    assert not woken


# Slots ---------------------------------------------------------------------------------------


async def test_all_free_slots_are_taken_at_once(slots: Slots) -> None:
    assert await slots.take_free() == 5
    assert slots.in_flight == 5
    slots.release(2)
    assert slots.in_flight == 3
    assert await slots.take_free() == 2


async def test_a_released_slot_goes_to_one_waiter(slots: Slots) -> None:
    await slots.take_free()
    takers = {asyncio.create_task(slots.take_free()) for _ in range(2)}
    await asyncio.sleep(0)
    slots.release(3)
    [first], [second] = await asyncio.wait(takers, return_when=asyncio.FIRST_COMPLETED)
    assert await first == 3
    slots.release(1)
    assert await second == 1
    assert slots.in_flight == 5


async def test_closed_slots_are_not_taken(slots: Slots) -> None:
    await slots.take_free()
    waiting = asyncio.create_task(slots.take_free())
    await asyncio.sleep(0)
    slots.close()
    assert await waiting == 0
    slots.release(5)
    assert slots.closed
    assert await slots.take_free() == 0


async def test_slots_are_idle_once_all_are_released(slots: Slots) -> None:
    await slots.wait_until_idle()
    await slots.take_free()
    slots.release(4)
    assert not await is_idle(slots)
    slots.release(1)
    assert await is_idle(slots)


async def is_idle(slots: Slots) -> bool:
    waiting = asyncio.create_task(slots.wait_until_idle())
    await asyncio.sleep(0)
    return waiting.done() or not waiting.cancel()


# Waiting -------------------------------------------------------------------------------------


class Wait:
    """A claim that waits for a permit."""

    def __init__(self) -> None:
        self._end = asyncio.Event()
        self.permit: Permit | None = None

    @property
    def ended(self) -> bool:
        return self._end.is_set()

    def resume(self, permit: Permit | None) -> None:
        assert not self.ended
        self.permit = permit
        self._end.set()

    async def end(self) -> None:
        await asyncio.wait_for(self._end.wait(), 10)


async def take(slots: Slots, number: int) -> None:
    slots.release(await slots.take_free() - number)


async def wait(slots: Slots, *routes: Route, seconds: float = 30) -> list[Wait]:
    """Take a slot for each claim, and let the claims wait."""
    await take(slots, len(routes))
    waits = [Wait() for _ in routes]
    slots.wait([(route, each.resume) for route, each in zip(routes, waits, strict=True)], seconds)
    return waits


@pytest.fixture
def few_may_wait(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(slots_module, "MAX_WAITING", 2)
    return 2


async def test_a_waiting_claim_holds_no_slot(slots: Slots, clock: Clock) -> None:
    send(slots, clock, SLOW, 2)
    await take(slots, 4)
    held = take_all(slots, SLOW)
    [waiting] = await wait(slots, SLOW)
    assert (waiting.ended, slots.in_flight) == (False, 4)
    slots.end(held[0])
    slots.release(1)
    assert waiting.permit is not None
    assert slots.in_flight == 4


async def test_a_claim_that_waits_comes_before_new_claims(slots: Slots, clock: Clock) -> None:
    send(slots, clock, SLOW, 2)
    await take(slots, 4)
    held = take_all(slots, SLOW)
    [waiting] = await wait(slots, SLOW)
    await slots.take_free()
    new_claims = asyncio.create_task(slots.take_free())
    await asyncio.sleep(0)
    slots.end(held[0])
    slots.release(1)
    await asyncio.sleep(0)
    assert waiting.permit is not None
    assert not new_claims.done()
    slots.close()
    await new_claims


async def test_a_permit_without_a_free_slot_resumes_no_waiting_claim(
    slots: Slots, clock: Clock
) -> None:
    """It also needs a slot."""
    send(slots, clock, SLOW, 2)
    await take(slots, 4)
    held = take_all(slots, SLOW)
    [waiting] = await wait(slots, SLOW)
    await slots.take_free()
    slots.end(held[0])
    slots.release(0)
    assert not waiting.ended
    slots.release(1)
    assert waiting.permit is not None


async def test_a_permit_goes_to_the_user_with_the_fewest_slots(slots: Slots, clock: Clock) -> None:
    eve, bert = (route("relay.test", user) for user in ("eve", "bert"))
    send(slots, clock, eve, 2)
    send(slots, clock, bert, 2)
    await take(slots, 4)
    [held, *_] = silent(slots, 3)
    take_all(slots, eve)
    [of_eve] = await wait(slots, eve)
    [of_bert] = await wait(slots, bert)
    assert not of_eve.ended
    assert not of_bert.ended
    slots.end(held)
    slots.release(1)
    assert (of_eve.ended, of_bert.permit is not None) == (False, True)


async def test_permits_go_to_claims_in_turn_and_to_each_endpoint(
    slots: Slots, clock: Clock
) -> None:
    send(slots, clock, SLOW, 2)
    send(slots, clock, NEW, 2)
    await take(slots, 4)
    held = take_all(slots, SLOW)
    [first] = await wait(slots, SLOW)
    [second] = await wait(slots, SLOW)
    [other] = await wait(slots, NEW)
    assert not any(each.ended for each in (first, second, other))
    assert slots.permit(SLOW) is None
    clock.now += 2
    for permit in held[:2]:
        slots.end(permit)
        slots.release(1)
    assert (first.ended, second.ended, other.ended) == (True, False, True)
    slots.close()
    assert second.ended
    assert second.permit is None


async def test_a_new_claim_gets_no_permit_before_the_claims_that_wait(
    slots: Slots, clock: Clock
) -> None:
    send(slots, clock, SLOW, 2)
    await take(slots, 4)
    held = take_all(slots, SLOW)
    await wait(slots, SLOW)
    slots.end(held[0])
    assert slots.permit(SLOW) is None


async def test_a_slot_stays_reserved_while_very_many_claims_wait(
    slots: Slots, clock: Clock, few_may_wait: int
) -> None:
    send(slots, clock, SLOW, 2)
    await take(slots, 4)
    take_all(slots, SLOW)
    waits = [await wait(slots, SLOW) for _ in range(few_may_wait + 1)]
    assert not any(each.ended for [each] in waits)
    assert slots.permit(SLOW) is None
    assert slots.in_flight == 4
    assert slots.permit(relay("bert"))


async def test_a_claim_beyond_the_limit_of_waiters_gets_no_permit_and_times_out(
    slots: Slots, clock: Clock, few_may_wait: int
) -> None:
    send(slots, clock, SLOW, 2)
    await take(slots, 4)
    held = take_all(slots, SLOW)
    waits = [each for _ in range(few_may_wait) for each in await wait(slots, SLOW)]
    [beyond] = await wait(slots, SLOW, seconds=0.01)
    for permit in held:
        slots.end(permit)
        slots.release(1)
    assert all(each.permit is not None for each in waits)
    assert not beyond.ended
    await beyond.end()
    assert beyond.permit is None


def test_a_single_slot_is_not_reserved(clock: Clock) -> None:
    slots = Slots(1, clock, unproven=2)
    send(slots, clock, SLOW, 5)
    assert slots.permit(SLOW)


async def test_a_wait_for_a_slot_times_out(slots: Slots, clock: Clock) -> None:
    send(slots, clock, SLOW, 2)
    await take(slots, 4)
    take_all(slots, SLOW)
    [waiting] = await wait(slots, SLOW, seconds=0.01)
    await waiting.end()
    assert waiting.permit is None
    # It holds a slot until its give-back is recorded.
    assert slots.in_flight == 5
    slots.release(1)
    assert slots.in_flight == 4


async def test_only_the_waits_for_one_endpoint_end(slots: Slots, clock: Clock) -> None:
    for each in (SLOW, NEW):
        send(slots, clock, each, 2)
    await take(slots, 4)
    take_all(slots, SLOW)
    [of_slow] = await wait(slots, SLOW)
    [of_new] = await wait(slots, NEW)
    slots.give_up(SLOW.endpoint)
    assert (of_slow.ended, of_slow.permit) == (True, None)
    assert not of_new.ended


async def test_slots_are_not_idle_while_a_claim_waits(
    slots: Slots, clock: Clock, few_may_wait: int
) -> None:
    send(slots, clock, SLOW, 2)
    await take(slots, 4)
    held = take_all(slots, SLOW)
    waits = [each for _ in range(few_may_wait + 1) for each in await wait(slots, SLOW)]
    slots.give_up(SLOW.endpoint)
    for permit in held:
        slots.end(permit)
    slots.release(4 + few_may_wait)
    assert slots.in_flight == 0
    assert not await is_idle(slots)
    slots.close()
    assert all(each.ended for each in waits)
    assert not await is_idle(slots)  # the last give-back is not recorded yet
    slots.release(1)
    assert await is_idle(slots)


async def test_slots_are_not_idle_while_the_last_claim_waits(slots: Slots, clock: Clock) -> None:
    send(slots, clock, SLOW, 2)
    take_all(slots, SLOW)
    [waiting] = await wait(slots, SLOW)
    assert (waiting.ended, slots.in_flight) == (False, 0)
    assert not await is_idle(slots)


async def test_no_claim_waits_after_close(slots: Slots, clock: Clock) -> None:
    send(slots, clock, SLOW, 2)
    await take(slots, 5)
    take_all(slots, SLOW)
    slots.close()
    late = Wait()
    slots.wait([(SLOW, late.resume)], 30)
    assert (late.ended, late.permit, slots.in_flight) == (True, None, 5)


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
