"""begin_, keep_ and finish_rebuild.lua: a shard is complete if nothing was lost meanwhile."""

from __future__ import annotations

from dataclasses import replace

from outbox_server.shared.queue.records import RebuildEnd
from tests.integration.queue.shard import SENDER, Shard


async def test_one_rebuild_runs_at_a_time(bare_shard: Shard) -> None:
    queue = bare_shard.queue
    token = await queue.begin_rebuild()
    assert token is not None

    assert await queue.begin_rebuild() is None
    assert await queue.finish_rebuild(token) is RebuildEnd.RESTORED
    assert not (await bare_shard.claim()).lost


async def test_a_rebuild_of_a_complete_shard_says_that_nothing_was_lost(bare_shard: Shard) -> None:
    queue = bare_shard.queue
    for end in (RebuildEnd.RESTORED, RebuildEnd.STILL_COMPLETE):
        token = await queue.begin_rebuild()
        assert token is not None
        assert await queue.finish_rebuild(token) is end


async def test_a_rebuild_interrupted_by_another_loss_does_not_complete(
    bare_shard: Shard,
) -> None:
    queue = bare_shard.queue
    token = await queue.begin_rebuild()
    assert token is not None
    await bare_shard.redis.flushall()
    await bare_shard.at(0)

    assert not await queue.finish_rebuild(token)
    assert (await queue.claim(1)).lost


async def test_a_rebuild_does_not_finish_the_rebuild_of_another(bare_shard: Shard) -> None:
    queue = bare_shard.queue
    first = await queue.begin_rebuild()
    await bare_shard.redis.flushall()
    await bare_shard.at(0)
    second = await queue.begin_rebuild()
    assert first is not None
    assert second is not None

    assert not await queue.finish_rebuild(first)
    assert (await queue.claim(1)).lost
    assert await queue.finish_rebuild(second)
    assert not await queue.finish_rebuild(second), "once"


async def test_the_lock_of_a_rebuild_that_died_expires(bare_shard: Shard) -> None:
    assert await bare_shard.queue.begin_rebuild() is not None

    assert 0 < await bare_shard.redis.pttl(bare_shard.queue.keys.rebuild) <= 10_000


async def test_a_running_rebuild_keeps_its_lock(bare_shard: Shard) -> None:
    queue, redis = bare_shard.queue, bare_shard.redis
    token = await queue.begin_rebuild()
    assert token is not None
    await redis.pexpire(queue.keys.rebuild, 5000)

    assert await queue.keep_rebuild(token)

    assert await redis.pttl(queue.keys.rebuild) > 5000
    assert await queue.finish_rebuild(token)


async def test_a_rebuild_that_lost_its_lock_does_not_extend_the_lock_of_another(
    bare_shard: Shard,
) -> None:
    queue, redis = bare_shard.queue, bare_shard.redis
    first = await queue.begin_rebuild()
    assert first is not None
    await redis.delete(queue.keys.rebuild)
    assert not await queue.keep_rebuild(first)
    second = await queue.begin_rebuild()
    assert second is not None
    await redis.pexpire(queue.keys.rebuild, 5000)

    assert not await queue.keep_rebuild(first)
    assert await redis.pttl(queue.keys.rebuild) <= 5000
    assert await queue.finish_rebuild(second)


async def test_a_loss_of_all_looks_is_noticed_although_some_are_back(shard: Shard) -> None:
    """An eviction took `ready`, and a batch was accepted since."""
    await shard.load(SENDER)
    assert not (await shard.claim(1)).lost
    await shard.redis.delete(shard.prefix + "ready")
    await shard.load(replace(SENDER, sender_id=8))

    assert (await shard.queue.claim(1)).lost
    assert not (await shard.queue.count_ready_jobs()).complete
    token = await shard.queue.begin_rebuild()
    assert token is not None
    assert await shard.queue.finish_rebuild(token) is RebuildEnd.RESTORED
    assert not (await shard.claim(1)).lost


async def test_a_rebuild_during_which_all_looks_are_lost_does_not_complete(shard: Shard) -> None:
    token = await shard.queue.begin_rebuild()
    assert token is not None
    await shard.redis.delete(shard.prefix + "ready")
    await shard.load(SENDER)

    assert not await shard.queue.keep_rebuild(token)
    assert not await shard.queue.finish_rebuild(token)
    assert (await shard.queue.claim(1)).lost


async def test_a_shard_without_senders_is_complete(shard: Shard) -> None:
    claimed = await shard.claim()
    assert claimed.next_look is None
    assert (await shard.queue.count_ready_jobs()).complete
