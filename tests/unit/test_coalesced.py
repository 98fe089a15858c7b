from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from outbox_server.shared import coalesced
from outbox_server.shared.coalesced import Coalesced
from outbox_server.shared.fair_shares import Claimant
from tests.eventually import PATIENCE, eventually


class Loads:
    """Records what is loaded. A load of a sender in `held` waits for `release`."""

    def __init__(self) -> None:
        self.made: list[list[int]] = []
        self.held: set[int] = set()
        self.release = asyncio.Event()
        self.failing: set[int] = set()

    async def __call__(self, sender_ids: Sequence[int]) -> Mapping[int, bool]:
        self.made.append(list(sender_ids))
        if self.held & set(sender_ids):
            await self.release.wait()
        if self.failing & set(sender_ids):
            raise RuntimeError("a bug")
        return dict.fromkeys(sender_ids, True)


async def test_calls_that_come_during_a_load_share_the_next_one() -> None:
    made = Loads()
    loads = Coalesced(made)
    made.held.add(1)
    first = asyncio.ensure_future(loads.get(1))
    await eventually(lambda: made.made == [[1]])
    others = [asyncio.ensure_future(loads.get(sender)) for sender in (2, 1, 3, 2)]
    await asyncio.sleep(0)
    assert not any(each.done() for each in (first, *others))
    made.release.set()
    assert await asyncio.gather(first, *others) == [True] * 5
    # Sender 1 again, because the second call may have committed after the first load had read.
    assert made.made == [[1], [2, 1, 3]]


async def test_a_cancelled_call_does_not_end_the_load_of_others() -> None:
    made = Loads()
    loads = Coalesced(made)
    made.held.add(1)
    leaves, stays = (asyncio.ensure_future(loads.get(1)) for _ in range(2))
    await eventually(lambda: made.made == [[1]])
    leaves.cancel()
    made.release.set()
    assert await stays
    assert leaves.cancelled()


async def test_a_slow_sender_is_loaded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Loads()
    loads = Coalesced(made)
    monkeypatch.setattr(coalesced, "_SLOW_S", -1.0)
    monkeypatch.setattr(coalesced, "_SLOW_TIMES", -1.0)
    assert await loads.get(1)
    monkeypatch.setattr(coalesced, "_SLOW_S", 60.0)
    made.held.add(1)
    slow = asyncio.ensure_future(loads.get(1))
    await eventually(lambda: made.made == [[1], [1]])
    assert list(await asyncio.gather(loads.get(2), loads.get(3))) == [True, True]
    assert made.made[2:] == [[2, 3]]
    made.release.set()
    assert await slow
    # It was fast this time: it shares again.
    made.held = {2}
    made.release.clear()
    waiting = [asyncio.ensure_future(loads.get(2))]
    await eventually(lambda: made.made[3:] == [[2]])
    waiting += [asyncio.ensure_future(loads.get(sender)) for sender in (1, 3)]
    made.release.set()
    await asyncio.gather(*waiting)
    assert made.made[4:] == [[1, 3]]


async def test_nobody_waits_for_the_loads_of_a_user_with_many_senders() -> None:
    made = Loads()
    loads = Coalesced(made)
    ann, eve = Claimant("ann"), Claimant("eve")
    made.held.update(range(10, 40))
    flood = [loads.begin(sender, eve) for sender in range(10, 40)]
    await eventually(lambda: len(made.made) == 1)
    assert await asyncio.wait_for(loads.begin(1, ann), PATIENCE)
    assert [1] in made.made
    assert not any(each.done() for each in flood)
    made.release.set()
    assert await asyncio.gather(*flood) == [True] * 30
    # Each of them once, some at a time; the last ones with those of everybody else.
    assert sorted(sender for load in made.made for sender in load) == [1, *range(10, 40)]
    assert max(map(len, made.made)) <= 16
    assert not loads._counts


async def test_an_unexpected_error_fails_no_later_load() -> None:
    made = Loads()
    loads = Coalesced(made)
    made.failing.add(1)
    assert list(await asyncio.gather(loads.get(1), loads.get(2))) == [None, None]
    assert await loads.get(2)


async def test_closing_waits_for_the_load_in_progress() -> None:
    made = Loads()
    loads = Coalesced(made)
    made.held.add(1)
    load = asyncio.ensure_future(loads.get(1))
    await eventually(lambda: made.made == [[1]])
    closing = asyncio.ensure_future(loads.close())
    await asyncio.sleep(0)
    assert not closing.done()
    made.release.set()
    await closing
    assert await load


async def test_slow_senders_are_loaded_a_few_at_a_time_and_each_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Loads()
    loads = Coalesced(made)
    monkeypatch.setattr(coalesced, "_SLOW_S", -1.0)
    monkeypatch.setattr(coalesced, "_SLOW_TIMES", -1.0)
    await asyncio.gather(*(loads.get(sender) for sender in range(1, 6)))
    monkeypatch.setattr(coalesced, "_SLOW_S", 60.0)
    made.made.clear()
    made.held = {1, 2, 3, 4, 5}
    first = [asyncio.ensure_future(loads.get(sender)) for sender in range(1, 6)]
    await eventually(lambda: len(made.made) == 3)
    # Calls for a sender that is being loaded wait for one further load.
    again = [asyncio.ensure_future(loads.get(1)) for _ in range(10)]
    # Another one shares a load as always.
    assert await loads.get(9)
    assert sorted(made.made) == [[1], [2], [3], [9]]
    made.release.set()
    assert all(await asyncio.gather(*first, *again))
    assert sum(load.count(1) for load in made.made) == 2
