"""The capacity of a dispatcher, on a clock that the test sets."""

from __future__ import annotations

import asyncio

import pytest

from outbox_server.services.dispatcher import slots as slots_module
from outbox_server.services.dispatcher.slots import Permit, Route, Slots

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
def slots(clock: Clock) -> Slots:
    return Slots(5, clock)


def take_all(slots: Slots, route: Route, most: int = 5) -> list[Permit]:
    permits: list[Permit] = []
    while len(permits) < most and (permit := slots.permit(route)):
        permits.append(permit)
    return permits


def send(slots: Slots, clock: Clock, route: Route, seconds: float) -> None:
    permit = slots.permit(route)
    assert permit is not None
    clock.now += seconds
    slots.end(permit)


# Permits -------------------------------------------------------------------------------------


def test_a_single_quick_endpoint_gets_all_slots(slots: Slots, clock: Clock) -> None:
    send(slots, clock, QUICK, 0.01)
    assert len(take_all(slots, QUICK)) == 5


def test_a_quick_endpoint_among_others_leaves_a_slot_free(slots: Slots, clock: Clock) -> None:
    send(slots, clock, QUICK, 0.01)
    send(slots, clock, NEW, 0.01)
    assert len(take_all(slots, QUICK)) == 4
    assert slots.permit(NEW)


def test_no_slot_is_reserved_for_an_endpoint_that_is_no_longer_used(
    slots: Slots, clock: Clock
) -> None:
    send(slots, clock, NEW, 0.01)
    clock.now += 61
    send(slots, clock, QUICK, 0.01)
    assert len(take_all(slots, QUICK)) == 5


def test_an_endpoint_that_has_never_answered_leaves_a_slot_free(slots: Slots) -> None:
    assert len(take_all(slots, SLOW)) == 4
    assert slots.permit(NEW)


def test_slow_endpoints_together_leave_a_slot_free(slots: Slots, clock: Clock) -> None:
    send(slots, clock, SLOW, 2)
    send(slots, clock, NEW, 2)
    send(slots, clock, QUICK, 0.01)
    assert len(take_all(slots, SLOW)) + len(take_all(slots, NEW)) == 4
    assert slots.permit(QUICK)


def test_an_endpoint_is_slow_as_soon_as_a_send_takes_long(slots: Slots, clock: Clock) -> None:
    send(slots, clock, QUICK, 0.01)
    held = take_all(slots, QUICK, 4)
    clock.now += 2
    assert slots.permit(QUICK) is None
    for permit in held:
        slots.end(permit)
    assert len(take_all(slots, QUICK)) == 4  # the last one was slow
    assert slots.permit(NEW)


def test_a_permit_that_was_not_used_says_nothing_about_the_endpoint(
    slots: Slots, clock: Clock
) -> None:
    send(slots, clock, QUICK, 0.01)
    permit = slots.permit(QUICK)
    assert permit is not None
    clock.now += 5
    slots.end(permit, sent=False)
    assert len(take_all(slots, QUICK)) == 5


def route(host: str, user: str) -> Route:
    return Route((host, 25), user)


def test_endpoints_that_never_answer_get_no_more_than_the_share_of_their_user(
    slots: Slots,
) -> None:
    assert slots.permit(route("good.test", "bert"))
    held = [slots.permit(route(f"silent{number}.test", "eve")) for number in range(9)]
    assert sum(permit is not None for permit in held) == 3  # with bert's permit, the share
    assert slots.permit(route("new.test", "carl"))


def test_quick_endpoints_get_no_more_than_the_share_of_their_user(
    slots: Slots, clock: Clock
) -> None:
    """Quick endpoints may all stop answering at the same time."""
    quick = [route(f"quick{number}.test", "eve") for number in range(3)]
    for each in quick:
        send(slots, clock, each, 0.01)
    good = route("good.test", "bert")
    send(slots, clock, good, 0.01)
    assert sum(len(take_all(slots, each, 2)) for each in quick) == 4
    clock.now += 300
    assert slots.permit(good)


def test_many_users_with_endpoints_that_never_answer_leave_slots_to_quick_ones(
    clock: Clock,
) -> None:
    slots = Slots(20, clock)
    good = route("good.test", "bert")
    send(slots, clock, good, 0.01)
    silent = [route(f"silent{number}.test", f"eve{number}") for number in range(30)]
    assert sum(slots.permit(each) is not None for each in silent) == 18
    clock.now += 300
    assert slots.permit(good)


def test_a_user_with_a_slow_endpoint_gets_a_slot_when_another_user_has_the_share(
    clock: Clock,
) -> None:
    slots = Slots(20, clock)
    slow = route("slow.test", "bert")
    send(slots, clock, slow, 2)
    assert len(take_all(slots, route("silent.test", "eve"), 20)) == 16
    assert len(take_all(slots, slow, 20)) == 1


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
    await take(slots, 4)
    held = take_all(slots, eve)
    [of_eve] = await wait(slots, eve)
    [of_bert] = await wait(slots, bert)
    assert not of_eve.ended
    assert not of_bert.ended
    clock.now += 2
    slots.end(held[0])
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
    assert slots.permit(NEW)


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
    slots = Slots(1, clock)
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
    for limit in ("_MAX_SENDERS", "_MAX_ENDPOINTS", "_MAX_USERS"):
        monkeypatch.setattr(slots_module, limit, 3)
    for number in range(9):
        each = route(f"{number}.test", f"user{number}")
        slots.learn(number, each)
        send(slots, clock, each, 61)
    assert [number for number in range(9) if slots.route_of(number)] == [6, 7, 8]
    assert len(slots._endpoints) <= 3
    assert len(slots._users) <= 3
