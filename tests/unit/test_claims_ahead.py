"""Claims for slots that will be free soon, on a clock that tests set."""

from __future__ import annotations

import asyncio

import pytest

from outbox_server.services.dispatcher.shares import Permit, Route
from outbox_server.services.dispatcher.slots import Slots
from outbox_server.shared.queue.user_limits import UserLimit
from tests.clock import Clock
from tests.slot_steps import QUICK, SLOW, WaitingClaim, relay, send, take_all


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def slots(clock: Clock) -> Slots:
    return Slots(5, clock, unproven=4)


async def busy(slots: Slots, route: Route) -> list[Permit]:
    """Use all slots that a user may have."""
    permits = take_all(slots, route)
    slots.release(await slots.take_free() - len(permits))
    return permits


def end(slots: Slots, *permits: Permit) -> None:
    """End sends. Their slots are free once `settled` is called."""
    for permit in permits:
        slots.end(permit)
    slots.hand_over(len(permits))


def ahead(slots: Slots, *routes: Route, seconds: float = 30) -> list[WaitingClaim]:
    """Let claims without slots wait, and return them."""
    waits = [WaitingClaim() for _ in routes]
    pairs = [(route, each.resume) for route, each in zip(routes, waits, strict=True)]
    slots.wait(pairs, seconds, slots=0)
    return waits


async def test_as_many_are_claimed_ahead_as_sends_ended_in_the_last_moment(
    slots: Slots, clock: Clock
) -> None:
    held = await busy(slots, relay("anna"))
    assert slots.take_ahead() == 0
    end(slots, *held[:2])
    slots.settled(2)
    assert slots.take_ahead() == 2
    assert slots.take_ahead() == 0
    slots.return_ahead(2)
    ahead(slots, relay("anna"))
    clock.now += 0.051
    assert slots.take_ahead() == 0
    slots.close()


async def test_a_claim_ahead_takes_the_slot_of_a_send_before_its_end_is_recorded(
    slots: Slots,
) -> None:
    [first, *_] = await busy(slots, relay("anna"))
    [waiting] = ahead(slots, relay("anna"))
    assert not waiting.ended
    end(slots, first)
    assert waiting.permit is not None
    # Only one of the two may be in doubt after a crash.
    assert slots.in_flight == 4
    slots.settled(1)
    slots.end_hand_over()
    assert slots.in_flight == 4


async def test_ends_that_were_not_recorded_leave_no_room_for_as_many_marks(slots: Slots) -> None:
    held = await busy(slots, relay("anna"))
    await slots.take_free()
    waits = ahead(slots, *[relay("anna")] * 3)
    end(slots, *held[:3])
    assert [each.ended for each in waits] == [True] * 3
    assert (slots.in_flight, slots.excess) == (5, 3)
    # One of the three ends was not recorded, so one of the claims was not marked.
    slots.not_marked(1)
    slots.settled(2)
    slots.end_hand_over()
    assert (slots.in_flight, slots.excess) == (5, 0)
    slots.settled(1, returned=1)
    assert slots.in_flight == 5


async def test_a_statement_that_failed_leaves_the_sends_in_flight_that_it_should_record(
    slots: Slots,
) -> None:
    held = await busy(slots, relay("anna"))
    ahead(slots, *[relay("anna")] * 3)
    end(slots, *held[:3])
    slots.not_marked(3)
    assert slots.in_flight == 4
    slots.settled(3)
    slots.end_hand_over()
    assert slots.in_flight == 1
    slots.settled(3, returned=3)
    assert slots.in_flight == 1


async def test_no_more_claims_take_over_than_sends_have_ended(slots: Slots) -> None:
    held = [*await busy(slots, relay("anna")), slots.permit(relay("bert"))]
    await slots.take_free()
    waits = ahead(slots, *[relay("carl")] * 3)
    assert held[0] is not None
    end(slots, held[0])
    assert [each.ended for each in waits] == [True, False, False]
    slots.close()


async def test_of_the_claims_ahead_those_of_the_user_who_has_less_come_first(
    slots: Slots,
) -> None:
    held = await busy(slots, relay("anna"))
    await slots.take_free()
    of_anna, of_bert = ahead(slots, relay("anna"), relay("bert"))
    end(slots, held[0])
    assert (of_anna.ended, of_bert.permit is not None) == (False, True)
    slots.close()


async def test_a_user_may_have_its_share_of_the_claims_ahead(slots: Slots) -> None:
    held = await busy(slots, relay("anna"))
    assert slots.limits(5) == [UserLimit("anna", first=0, most=0)]
    end(slots, *held)
    slots.settled(4)
    await busy(slots, relay("anna"))
    assert slots.take_ahead() == 4
    assert slots.limits(5) == [UserLimit("anna", first=1, most=4)]
    ahead(slots, *[relay("anna")] * 8)
    assert slots.limits(5) == [UserLimit("anna", first=0, most=0)]
    slots.close()


@pytest.mark.parametrize("users", [["anna"], ["anna", "bert"], ["anna", "bert", "carl"]])
async def test_users_who_had_all_slots_come_after_a_user_who_had_none(users: list[str]) -> None:
    """Otherwise those whose mail waits longest would have them until nothing of theirs waits."""
    slots = Slots(len(users), unproven=2)
    for user in [*users * 5, "dora"]:
        permit = slots.permit(relay(user))
        assert permit is not None
        slots.end(permit)
    # Before them comes dora, who had less. In each second claim, who had none comes before all.
    for served in (set(users), {*users, "dora"}):
        limits = slots.limits(1)
        assert {limit.user for limit in limits if not limit.first and limit.most} == served


async def test_a_user_alone_does_not_come_after_users_who_have_the_reserve(slots: Slots) -> None:
    for _ in range(20):
        permit = slots.permit(relay("anna"))
        assert permit is not None
        slots.end(permit)
    assert slots.limits(5) == []


async def test_claims_for_slow_endpoints_use_up_nothing_that_may_be_claimed_ahead(
    slots: Slots, clock: Clock
) -> None:
    send(slots, clock, SLOW, 2)
    send(slots, clock, QUICK, 0.01)
    ahead(slots, *[SLOW] * 5)
    held = await busy(slots, QUICK)
    end(slots, *held)
    slots.settled(len(held))
    assert slots.take_ahead() == len(held)
    slots.close()


async def test_nothing_is_claimed_ahead_while_too_many_claims_wait(
    slots: Slots, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox_server.services.dispatcher.slots.MAX_WAITING", 7)
    send(slots, clock, SLOW, 2)
    take_all(slots, SLOW)
    ahead(slots, *[SLOW] * 5)
    held = await busy(slots, relay("bert"))
    end(slots, *held)
    slots.settled(len(held))
    assert len(held) == 4
    # Of four, two may still wait for a slot.
    assert slots.take_ahead() == 2
    slots.return_ahead(2)
    await slots.take_free()
    ahead(slots, relay("bert"))
    assert slots.take_ahead() == 0
    slots.close()


async def test_a_marked_job_comes_before_the_claims_that_wait(slots: Slots) -> None:
    # Its sender's route was not known before. Given back, it would be claimed and marked again.
    held = await busy(slots, relay("anna"))
    ahead(slots, relay("anna"))
    slots.end(held[0])
    assert slots.permit(relay("anna")) is None
    assert slots.permit(relay("anna"), marked=True)
    slots.close()


async def test_claims_ahead_go_back_to_the_queue_before_long(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox_server.services.dispatcher.slots._LONGEST_AHEAD_S", 0.01)
    await busy(slots, relay("anna"))
    [waiting] = ahead(slots, relay("anna"))
    await waiting.end()
    assert waiting.permit is None
    assert slots.in_flight == 4


async def test_claims_of_unknown_routes_wait_for_a_slot_too(slots: Slots) -> None:
    unknown = Route("", "anna")
    held = take_all(slots, unknown)
    assert len(held) == 4
    await slots.take_free()
    waits = ahead(slots, unknown, unknown)
    assert slots.permit(unknown) is None
    end(slots, held[0])
    assert [each.ended for each in waits] == [True, False]
    slots.close()


async def test_a_claim_that_needs_fewer_slots_leaves_room_for_users_who_were_limited(
    clock: Clock,
) -> None:
    signals: list[None] = []
    slots = Slots(5, clock, unproven=4, on_room=lambda: signals.append(None))
    held = take_all(slots, relay("anna"), 3)
    slots.limited(0, [UserLimit("anna", first=0, most=0)])
    # A claim of another shard has the two other slots.
    assert await slots.take_free() == 5
    ahead(slots, relay("anna"))
    end(slots, held[0])
    clock.now += 0.06
    slots.settled(1)
    assert signals == []
    slots.release(2)
    slots.return_ahead(0)
    assert signals == [None]
    slots.close()


async def test_slots_are_not_idle_while_a_claim_may_bring_jobs(slots: Slots) -> None:
    held = await busy(slots, relay("anna"))
    end(slots, *held)
    assert slots.take_ahead() == 4
    slots.settled(4)
    idle = asyncio.create_task(slots.wait_until_idle())
    await asyncio.sleep(0)
    assert not idle.done()
    slots.return_ahead(4)
    await idle


async def test_a_claim_is_made_when_only_jobs_ahead_can_be_taken(slots: Slots) -> None:
    held = [*await busy(slots, relay("anna")), slots.permit(relay("bert"))]
    await slots.take_free()
    more = asyncio.create_task(slots.take_free())
    await asyncio.sleep(0)
    assert not more.done()
    waits = ahead(slots, relay("carl"))
    assert held[0] is not None
    end(slots, held[0])
    slots.settled(1)
    assert waits[0].permit is not None
    assert await more == 0
    assert slots.take_ahead() == 1
