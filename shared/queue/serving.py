"""Checks that Redis serves: a script writes in each shard, as a claim does, and leaves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from redis.asyncio import Redis

from outbox_server.shared.queue.queue import Queue

# Refused by a server that is out of memory, is a replica, does not hold the slot, or lets this user
# write no such key.
_WRITE: Final = "redis.call('SET', KEYS[1], 1, 'PX', 1000) return redis.call('DEL', KEYS[1])"


async def check_serving(redis: Redis, queues: Sequence[Queue]) -> None:
    """Check that each shard can be written, in one round trip.

    Raises:
        redis.exceptions.RedisError, OSError: a shard cannot; the error of the first such one.
    """
    async with redis.pipeline(transaction=False) as pipeline:
        for queue in queues:
            pipeline.eval(_WRITE, 1, queue.keys.health)
        for answer in await pipeline.execute(raise_on_error=False):
            if isinstance(answer, Exception):
                raise answer
