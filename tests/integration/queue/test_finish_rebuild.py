"""finish_rebuild.lua and the lock of a rebuild: a shard is whole if nothing was lost meanwhile."""

from __future__ import annotations

from tests.integration.queue.shard import Shard


async def test_one_rebuild_is_under_way_at_a_time(bare_shard: Shard) -> None:
    queue = bare_shard.queue
    token = await queue.begin_rebuild()
    assert token is not None

    assert await queue.begin_rebuild() is None
    assert await queue.finish_rebuild(token)
    assert not (await bare_shard.claim()).lost


async def test_a_rebuild_during_which_redis_was_lost_again_does_not_make_it_whole(
    bare_shard: Shard,
) -> None:
    queue = bare_shard.queue
    token = await queue.begin_rebuild()
    assert token is not None
    await bare_shard.redis.flushall()

    assert not await queue.finish_rebuild(token)
    await bare_shard.at(0)
    assert (await queue.claim(1)).lost


async def test_a_rebuild_does_not_finish_that_of_another(bare_shard: Shard) -> None:
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


async def test_a_rebuild_that_died_frees_its_lock_by_itself(bare_shard: Shard) -> None:
    assert await bare_shard.queue.begin_rebuild() is not None

    assert 0 < await bare_shard.redis.pttl(bare_shard.queue.keys.rebuild) <= 30_000
