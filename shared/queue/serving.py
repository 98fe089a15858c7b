"""Checks that Redis serves: a script writes in each shard, as a claim does, and leaves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from redis.asyncio import Redis

from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.store_trouble import ShardsFailedError

# Refused by a server that is out of memory, is a replica, does not hold the slot, or lets this user
# write no such key.
_WRITE: Final = "redis.call('SET', KEYS[1], 1, 'PX', 1000) return redis.call('DEL', KEYS[1])"


async def check_serving(queues: Sequence[Queue]) -> None:
    """Check that each shard can be written, in one round trip to each server.

    Raises:
        redis.exceptions.RedisError, OSError: a shard cannot. If some can, the text says which ones
            cannot.
    """
    by_client: dict[Redis, list[Queue]] = {}
    for queue in queues:
        by_client.setdefault(queue.redis, []).append(queue)
    answers = await asyncio.gather(*(_check(*each) for each in by_client.items()))
    failed = {shard: error for found in answers for shard, error in sorted(found.items())}
    if not failed:
        return
    cause = failed[min(failed)]
    if len(failed) == len(queues):
        raise cause
    raise ShardsFailedError(cause, sorted(failed), len(queues)) from cause


async def _check(redis: Redis, queues: Sequence[Queue]) -> dict[int, Exception]:
    """Return the errors of the shards of one client, by shard."""
    try:
        async with redis.pipeline(transaction=False) as pipeline:
            for queue in queues:
                pipeline.eval(_WRITE, 1, queue.keys.health)
            answers = await pipeline.execute(raise_on_error=False)
    except QUEUE_ERRORS as error:
        return {queue.shard: error for queue in queues}
    return {
        queue.shard: answer
        for queue, answer in zip(queues, answers, strict=True)
        if isinstance(answer, Exception)
    }
