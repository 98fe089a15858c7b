"""upcoming.lua: the jobs that may be sent soon."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from outbox_server.shared.queue.records import LimitUse, UpcomingJobs, UserHead
from tests.integration.queue.shard import SENDER, START_MS, Shard, jobs

SECOND = timedelta(seconds=1)


async def find(shard: Shard, last: UpcomingJobs | None = None, most: int = 100) -> UpcomingJobs:
    return await shard.queue.find_upcoming(SECOND, most, last)


async def test_each_sender_is_found_once_a_second_before_its_next_send(shard: Shard) -> None:
    await shard.load(
        replace(SENDER, jobs=jobs((1, 2_000), (2, 2_000))),
        replace(SENDER, sender_id=8, jobs=jobs((3, 2_500))),
        replace(SENDER, sender_id=9, jobs=jobs((4, 0)), active=False),
    )
    before = await shard.redis.dump(shard.queue.keys.ready)
    found = await find(shard)
    assert (found.job_ids, found.more) == ((), False)
    await shard.at(1_000)
    found = await find(shard, found)
    assert found.job_ids == (1,)
    await shard.at(1_500)
    found = await find(shard, found)
    assert found.job_ids == (3,)
    # It changes nothing, and does not see what may be claimed already.
    assert await shard.redis.dump(shard.queue.keys.ready) == before
    await shard.at(2_600)
    found = await find(shard, found)
    assert found.job_ids == ()
    # The gap is what the next send waits for.
    claims = (await shard.claim()).claims
    for claim in claims:
        await shard.settle(claim, LimitUse.COUNTED)
    await shard.at(3_600)
    assert (await find(shard, found)).job_ids == (2,)


async def test_many_senders_with_one_due_time_are_found_in_parts(shard: Shard) -> None:
    await shard.load(
        *(replace(SENDER, sender_id=n, jobs=jobs((n, 400 if n < 3 else 500))) for n in range(1, 13))
    )
    found, seen = None, list[int]()
    for expected in (5, 5, 2):
        found = await find(shard, found, most=5)
        assert (len(found.job_ids), found.more) == (expected, expected == 5)
        seen += found.job_ids
    assert sorted(seen) == list(range(1, 13))
    # What comes earlier than the place is found with the next place.
    await shard.at(100)
    assert (await find(shard, found)).job_ids == ()
    # A clock that was set back.
    await shard.at(-60_000)
    assert found is not None
    assert (await find(shard, found)).after == START_MS - 60_000 + 1_001


async def test_the_limiter_of_a_user_is_not_a_sender(shard: Shard) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 500)), user="ann", user_limited=True))
    epochs = await shard.queue.begin_user_loads(["ann"], committed=False)
    await shard.queue.load_users([UserHead("ann", hourly_limit=1)], epochs)
    await shard.redis.zadd(shard.queue.keys.ready, {"u:ann": START_MS + 400})
    assert (await find(shard)).job_ids == (1,)
