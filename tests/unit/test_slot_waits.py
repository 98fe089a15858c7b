"""Taking, releasing and waiting for the slots of a dispatcher, on a clock that tests set."""

from __future__ import annotations

import asyncio

import pytest

from outbox_server.services.dispatcher import slots as slots_module
from outbox_server.services.dispatcher.slots import Slots
from tests.clock import Clock
from tests.slot_steps import (
    NEW,
    SLOW,
    WaitingClaim,
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


# Slots ---------------------------------------------------------------------------------------


async def test_the_slots_of_a_claim_in_progress_are_not_in_flight(slots: Slots) -> None:
    taken = await slots.take_free()
    with slots.claiming(taken):
        assert slots.in_flight == 0
    assert slots.in_flight == taken == 5


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
    # It holds a slot until its give-back is recorded, but it was not marked.
    assert slots.in_flight == 4
    more = asyncio.create_task(slots.take_free())
    await asyncio.sleep(0)
    assert not more.done()
    slots.settled(1, returned=1)
    assert await more == 1


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
    slots.settled(4 + few_may_wait, returned=few_may_wait)
    assert slots.in_flight == 0
    assert not await is_idle(slots)
    slots.close()
    assert all(each.ended for each in waits)
    assert not await is_idle(slots)  # the last give-back is not recorded yet
    slots.settled(1, returned=1)
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
    late = WaitingClaim()
    slots.wait([(SLOW, late.resume)], 30)
    assert (late.ended, late.permit, slots.in_flight) == (True, None, 4)
