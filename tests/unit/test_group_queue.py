from __future__ import annotations

from dataclasses import dataclass

from outbox_server.services.scheduler.group_queue import GroupQueue
from outbox_server.shared.fair_shares import Claimant

ANN, BOB, EVE, FAY = map(Claimant, ("ann", "bob", "eve", "fay"))


@dataclass(eq=False)
class WaitingCall:
    claimant: Claimant
    request_id: str
    row_count: int = 1
    has_left: bool = False


def queue_of(*calls: WaitingCall, now: float = 0.0) -> GroupQueue[WaitingCall]:
    queue: GroupQueue[WaitingCall] = GroupQueue()
    for call in calls:
        queue.add(call, now)
    return queue


def calls_of(claimant: Claimant, count: int, row_count: int = 1) -> list[WaitingCall]:
    return [WaitingCall(claimant, f"{claimant.name}-{n}", row_count) for n in range(count)]


def ids(group: list[WaitingCall]) -> list[str]:
    return [call.request_id for call in group]


def test_one_claimant_alone_has_large_groups() -> None:
    queue = queue_of(*calls_of(EVE, 100))
    assert [len(queue.next_group(0, many=many)) for many in (False, True)] == [0, 64]


def test_claimants_with_many_calls_have_small_groups_of_their_own_beside_others() -> None:
    queue = queue_of(*calls_of(EVE, 100), *calls_of(ANN, 2), *calls_of(BOB, 1))
    assert ids(queue.next_group(1, many=False)) == ["ann-0", "bob-0", "ann-1"]
    assert len(queue.next_group(1, many=True)) == 16
    # Two seconds after the last change of caller, they are large again.
    assert len(queue.next_group(3, many=True)) == 64


def test_those_with_many_calls_take_turns() -> None:
    queue = queue_of(*calls_of(EVE, 30), *calls_of(FAY, 30))
    group = queue.next_group(1, many=True)
    assert ids(group)[:3] == ["eve-0", "fay-0", "eve-1"]
    assert len(group) == 16


def test_nobody_has_two_groups_at_a_time() -> None:
    queue = queue_of(*calls_of(EVE, 1))
    assert ids(queue.next_group(0, many=False)) == ["eve-0"]
    for call in calls_of(EVE, 9):
        queue.add(call, 0)
    assert not queue.has_group(many=True)
    queue.end_group(many=False)
    assert queue.has_group(many=True)


def test_rows_limit_a_group() -> None:
    queue = queue_of(*calls_of(EVE, 30, row_count=100))
    assert len(queue.next_group(0, many=True)) == 10
    queue.add(WaitingCall(ANN, "ann"), 1)
    assert len(queue.next_group(1, many=True)) == 2


def test_calls_whose_callers_have_left_and_repeated_requests_are_left_out() -> None:
    first, again, gone = (
        WaitingCall(ANN, "a"),
        WaitingCall(ANN, "a"),
        WaitingCall(ANN, "b", has_left=True),
    )
    queue = queue_of(first, gone, again)
    assert queue.next_group(0, many=False) == [first]
    assert queue.next_group(0, many=False) == [again]
    assert not queue.has_group(many=False)


def test_calls_that_are_put_back_come_first() -> None:
    queue = queue_of(*calls_of(ANN, 3))
    group = queue.next_group(0, many=False)
    queue.add(WaitingCall(BOB, "bob"), 0)
    queue.add(WaitingCall(ANN, "later"), 0)
    queue.put_back(group[1:])
    assert ids(queue.take_all()) == ["ann-1", "ann-2", "later", "bob"]
    assert queue.take_all() == []
