"""limiter.lua: the current limits of a sender."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.records import LimitUse, PastEnd
from outbox_server.shared.queue.user_limits import UserLimit
from tests.integration.queue.shard import SENDER, WINDOW_MS, Shard, jobs, milliseconds

HEAD = replace(SENDER, hourly_limit=2, jobs=jobs((1, 0), (2, 0), (3, 0)))
ID = SENDER.sender_id


async def test_a_sender_that_is_not_loaded_has_no_limiter(shard: Shard) -> None:
    assert await shard.queue.read_limiter(ID) is None


async def test_the_limiter_reports_gap_and_window_separately(shard: Shard) -> None:
    ends = [
        PastEnd(JobRef(90 + n, 1), milliseconds(ago), True) for n, ago in ((1, 500), (2, 9_000))
    ]
    await shard.load(replace(HEAD, ends=tuple(ends)))
    found = await shard.queue.read_limiter(ID)
    assert found is not None
    assert found.in_flight == 0
    assert found.gap_left == milliseconds(1_500)
    assert found.window_left == milliseconds(WINDOW_MS - 9_000)


async def test_sends_in_flight_take_an_entry_and_reading_the_limiter_changes_nothing(
    shard: Shard,
) -> None:
    await shard.load(HEAD)
    (claim,) = (await shard.claim()).claims
    found = await shard.queue.read_limiter(ID)
    assert found is not None
    assert (found.in_flight, found.window_left <= timedelta(0)) == (1, True)
    before = await shard.sender(ID)
    await shard.queue.read_limiter(ID)
    assert await shard.sender(ID) == before
    await shard.settle(claim, LimitUse.COUNTED)
    found = await shard.queue.read_limiter(ID)
    assert found is not None
    assert (found.in_flight, found.gap_left) == (0, SENDER.gap)


async def test_the_limiter_says_how_long_ago_a_job_was_claimed(shard: Shard) -> None:
    await shard.load(HEAD)
    (claim,) = (await shard.claim()).claims
    await shard.at(1_500)
    found = await shard.queue.read_limiter(ID, claim.job)
    assert found is not None
    assert found.claimed_for == milliseconds(1_500)
    other = await shard.queue.read_limiter(ID, JobRef(2, 1))
    assert other is not None
    assert other.claimed_for is None


async def test_the_limiter_says_that_a_users_share_delays_a_sender(shard: Shard) -> None:
    await shard.load(replace(HEAD, user="eve"))
    for limits, parked in (([UserLimit("eve", 0, 0)], True), ([], False)):
        await shard.claim(1, *limits)
        found = await shard.queue.read_limiter(ID, JobRef(1, 1))
        assert found is not None
        assert found.parked is parked
