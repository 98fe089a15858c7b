"""Sending hours in Redis: nothing is claimed outside of an opening, and a load brings the next."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from tests.integration.queue.shard import SENDER, START_MS, Shard, jobs

NO_GAP = replace(SENDER, gap=timedelta(0))


def opening(begins: int, ends: int) -> tuple[int, int]:
    return START_MS + begins, START_MS + ends


async def test_a_job_waits_for_the_opening_and_is_not_late_by_that(shard: Shard) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0), (2, 0)), opening=opening(1_000, 5_000)))
    assert await shard.ready() == {SENDER.sender_id: 1_000}
    await shard.at(999)
    assert await shard.claimed() == []
    await shard.at(1_010)
    claimed = await shard.claim(1)
    assert [claim.job.job_id for claim in claimed.claims] == [1]
    assert claimed.claims[0].waited == timedelta(milliseconds=10)


async def test_after_the_opening_a_load_is_asked_for_and_nothing_is_claimed(shard: Shard) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs((1, 6_000)), opening=opening(0, 5_000)))
    # Due when it is over: nothing is to be seen before that.
    assert await shard.ready() == {SENDER.sender_id: 5_000}
    await shard.at(6_500)
    claimed = await shard.claim()
    assert (claimed.claims, claimed.loads) == ((), (SENDER.sender_id,))
    # Once, until somebody has had the time to do it.
    again = await shard.claim()
    assert (again.claims, again.loads) == ((), ())
    await shard.load(replace(NO_GAP, jobs=jobs((1, 6_000)), opening=opening(9_000, 12_000)))
    assert await shard.ready() == {SENDER.sender_id: 9_000}
    await shard.at(9_000)
    assert await shard.claimed() == [1]


async def test_the_end_of_an_opening_stops_what_is_due(shard: Shard) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0), (2, 0)), opening=opening(0, 5_000)))
    await shard.at(4_999)
    assert await shard.claimed(1) == [1]
    await shard.at(5_000)
    assert await shard.claimed() == []


async def test_a_sender_without_hours_sends_at_any_time(shard: Shard) -> None:
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0)), opening=opening(0, 1_000)))
    await shard.load(replace(NO_GAP, jobs=jobs((1, 0))), committed=True)
    await shard.at(2_000)
    assert await shard.claimed() == [1]
