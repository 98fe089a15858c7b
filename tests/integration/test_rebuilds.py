"""A rebuild of Redis that fails before its end, and which rebuilds are counted."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from outbox_server.shared.heads.loader import HeadLoader, RebuildResult
from tests.eventually import eventually
from tests.world import World


class FailsOnce(HeadLoader):
    """Loses its connection at the first load, and again after `failed` is set to False."""

    failed = False

    async def load(self, sender_ids: Iterable[int], *, committed: bool) -> None:
        if not self.failed:
            self.failed = True
            raise ConnectionError
        await super().load(sender_ids, committed=committed)


async def test_a_failed_rebuild_does_not_delay_the_next_one(world: World) -> None:
    await world.schedule(await world.sender(), load=False)
    queue = world.queues[0]
    loader = FailsOnce(world.engine, world.queues, world.settings)
    with pytest.raises(ConnectionError):
        await loader.rebuild(queue)

    # The lock would last 10 s, but it has been released, or has at most a millisecond left.
    assert await world.redis.pttl(queue.keys.rebuild) <= 1
    await eventually(lambda: world.loader.rebuild(queue))


async def test_only_a_rebuild_of_a_lost_shard_is_counted(world: World) -> None:
    queue = world.queues[0]
    sender = await world.sender()
    counted: list[RebuildResult] = []
    loader = HeadLoader(world.engine, world.queues, world.settings, on_rebuild=counted.append)
    await world.schedule(sender, load=False)
    assert await loader.rebuild(queue)
    assert counted == [RebuildResult.COMPLETE]

    # A batch whose head is not loaded yet, as a moment after each commit.
    other = await world.sender()
    await world.schedule(other, load=False)
    assert await loader.rebuild(queue)
    assert await world.redis.zscore(queue.keys.ready, other) is not None
    assert counted == [RebuildResult.COMPLETE]

    await world.redis.flushall()
    assert await loader.rebuild(queue)
    assert counted == [RebuildResult.COMPLETE] * 2


async def test_only_a_failed_rebuild_of_a_lost_shard_is_counted(world: World) -> None:
    queue = world.queues[0]
    counted: list[RebuildResult] = []
    loader = FailsOnce(world.engine, world.queues, world.settings, on_rebuild=counted.append)
    await world.schedule(await world.sender(), load=False)
    with pytest.raises(ConnectionError):
        await loader.rebuild(queue)
    assert counted == [RebuildResult.FAILED]
    await eventually(lambda: loader.rebuild(queue))
    assert counted == [RebuildResult.FAILED, RebuildResult.COMPLETE]

    # PostgreSQL fails during a rebuild of a complete shard. A batch was just accepted.
    await world.schedule(await world.sender(), load=False)
    loader.failed = False
    with pytest.raises(ConnectionError):
        await loader.rebuild(queue)
    assert counted == [RebuildResult.FAILED, RebuildResult.COMPLETE]
