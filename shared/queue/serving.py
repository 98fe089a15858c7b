"""Checks that Redis serves: in each shard, a script does what claims do and leaves no data."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.store_trouble import ShardsFailedError


async def check_serving(queues: Sequence[Queue]) -> None:
    """Check each shard by the connection of its claims, all at once.

    Raises:
        redis.exceptions.RedisError, OSError: a shard cannot be used. If only some fail, the text
            names them.
    """
    answers = await asyncio.gather(
        *(queue.check_serving() for queue in queues), return_exceptions=True
    )
    failed = {
        queue.shard: answer
        for queue, answer in zip(queues, answers, strict=True)
        if isinstance(answer, BaseException)
    }
    if not failed:
        return
    cause = failed[min(failed)]
    if len(failed) == len(queues):
        raise cause
    raise ShardsFailedError(cause, sorted(failed), len(queues)) from cause
