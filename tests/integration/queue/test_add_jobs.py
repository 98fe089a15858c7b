"""add_jobs.lua: jobs that were just committed join the head of a sender that Redis knows."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from outbox_server.shared.queue.queue import HEAD_SIZE
from outbox_server.shared.queue.records import LimitUse
from tests.integration.queue.shard import SENDER, START_MS, Shard, jobs, members

EARLIER = replace(SENDER, jobs=jobs((1, 50), (2, 60)))


async def test_new_jobs_join_the_head_in_the_order_of_their_times(shard: Shard) -> None:
    await shard.load(EARLIER)

    assert await shard.queue.add_jobs({7: jobs((3, 55), (4, 20))}) == []

    state = await shard.sender()
    assert list(state.due) == members(4, 1, 3, 2)
    assert await shard.ready() == {7: 20}
    await shard.at(20)
    assert await shard.claimed() == [4]


async def test_a_load_read_before_the_commit_does_not_remove_them(shard: Shard) -> None:
    await shard.load(EARLIER)
    epochs = await shard.queue.begin_load([7], committed=False)

    await shard.queue.add_jobs({7: jobs((3, 70))})

    assert await shard.queue.load_heads([EARLIER], epochs) == [7]
    assert list((await shard.sender()).due) == members(1, 2, 3)


async def test_a_full_head_keeps_its_first_jobs_and_a_load_brings_the_others(shard: Shard) -> None:
    first = jobs(*((number, 10 * number) for number in range(1, HEAD_SIZE + 1)))
    await shard.load(replace(SENDER, jobs=first))

    await shard.queue.add_jobs({7: jobs((500, 15), (501, 10 * HEAD_SIZE + 1))})

    state = await shard.sender()
    assert len(state.due) == HEAD_SIZE
    assert list(state.due)[1:3] == members(500, 2)
    assert list(state.due)[-1:] == members(HEAD_SIZE - 1)
    assert int(state.settings["horizon"]) == START_MS + 10 * (HEAD_SIZE - 1)


async def test_a_job_beyond_the_horizon_is_left_to_a_load(shard: Shard) -> None:
    """Jobs that wait in PostgreSQL alone are due before it."""
    await shard.load(replace(SENDER, jobs=jobs((1, 10)), more=True))

    await shard.queue.add_jobs({7: jobs((2, 11), (3, 10), (4, 9))})

    assert list((await shard.sender()).due) == members(4, 1, 3)


async def test_senders_that_redis_does_not_know_must_be_loaded(shard: Shard) -> None:
    await shard.load(SENDER)
    await shard.load(replace(SENDER, sender_id=8))
    await shard.redis.delete(shard.prefix + "sender:8")
    await shard.queue.begin_load([9], committed=True)
    new = jobs((1, 0))

    assert await shard.queue.add_jobs({7: new, 8: new, 9: new}) == [8, 9]

    assert list(await shard.ready()) == [7]
    await shard.redis.flushall()
    await shard.at(1)
    assert await shard.queue.add_jobs({7: new}) == [7]


async def test_a_job_that_is_claimed_already_is_not_added(shard: Shard) -> None:
    """A load that began after the commit may come first."""
    await shard.load(replace(SENDER, gap=timedelta(0), jobs=jobs((1, 0))))
    (claim,) = (await shard.claim()).claims

    await shard.queue.add_jobs({7: jobs((1, 0), (2, 0))})

    assert list((await shard.sender()).due) == members(2)
    await shard.settle(claim)
    assert await shard.claimed() == [2]


async def test_a_sender_that_had_no_jobs_does_not_expire(shard: Shard) -> None:
    await shard.load(replace(SENDER, jobs=jobs((1, 0))))
    (claim,) = (await shard.claim()).claims
    await shard.settle(claim, use=LimitUse.COUNTED)
    idle = await shard.sender()
    assert idle.settings_expire
    assert idle.window_expires

    await shard.queue.add_jobs({7: jobs((2, 5_000))})

    state = await shard.sender()
    assert not state.settings_expire
    assert not state.window_expires


async def test_after_a_refused_load_new_jobs_are_left_to_loads_until_one_succeeds(
    shard: Shard,
) -> None:
    """Otherwise additions could refuse the loads of a busy sender for ever."""
    await shard.load(EARLIER)
    epochs = await shard.queue.begin_load([7], committed=False)
    assert await shard.queue.add_jobs({7: jobs((3, 70))}) == []
    assert await shard.queue.load_heads([EARLIER], epochs) == [7]
    epochs = await shard.queue.begin_load([7], committed=False)

    assert await shard.queue.add_jobs({7: jobs((4, 80))}) == [7]

    assert await shard.queue.load_heads([EARLIER], epochs) == []
    assert await shard.queue.add_jobs({7: jobs((5, 90))}) == []
    assert list((await shard.sender()).due) == members(1, 2, 5)


async def test_a_sender_that_may_not_send_is_loaded(shard: Shard) -> None:
    """If it was deleted meanwhile, its jobs must not stay in Redis."""
    await shard.load(replace(SENDER, active=False))

    assert await shard.queue.add_jobs({7: jobs((1, 0))}) == [7]

    state = await shard.sender()
    assert not state.due
    assert state.settings_expire


async def test_a_full_head_does_not_take_more_memory(shard: Shard) -> None:
    """Redis stores a sorted set of up to 128 members as a list, and never turns it back."""
    await shard.load(EARLIER)
    before = await shard.redis.object("ENCODING", shard.prefix + "due:7")

    await shard.queue.add_jobs(
        {7: jobs(*((number, 1000 - number) for number in range(10, 2 * HEAD_SIZE)))}
    )

    assert len((await shard.sender()).due) == HEAD_SIZE
    assert await shard.redis.object("ENCODING", shard.prefix + "due:7") == before
