"""Goes through all concerned senders, a few each second, and loads those that Redis has lost.

Claims notice what an eviction or a crash can lose (docs/reliability.md). The patrol is for what
they cannot notice: a sender's entry in `ready` that a person or a fault removed. Its cost per
second does not depend on the number of senders, but the length of a round does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from typing import Final

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.heads.concerned import ConcernedSender, Walk, find_lost
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.queue import Queue

# The maximum number of senders of one part. Each takes 20 us of PostgreSQL and 10 us of Redis.
PART: Final = 250
# If this share of a part is lost, more is probably lost, so the next part follows at once.
_MANY: Final = 0.1
_AT_ONCE: Final = timedelta(0)
_log = structlog.get_logger(__name__)


class Patrol:
    """The patrol of one process. The processes share one place in the order of senders."""

    def __init__(
        self,
        engine: AsyncEngine,
        queues: Sequence[Queue],
        *,
        find_queues: Callable[[Sequence[int]], Awaitable[Mapping[int, Queue]]],
        load: Callable[[Sequence[int]], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._queues = queues
        self._find_queues = find_queues
        self._load = load
        self._walk = Walk()
        # Whether the next part follows at once.
        self._hurries = False
        # The number of rounds to finish without pauses.
        self._rounds_at_once = 0

    def hurry(self) -> None:
        """Go through all senders at once, because PostgreSQL may differ from Redis anywhere."""
        self._hurries = True
        # The rest of the present round, and one whole round.
        self._rounds_at_once = 2

    async def step(self, pause: timedelta) -> timedelta:
        """Examine the next part, unless a process began one less than `pause` ago.

        Returns when to call again.
        """
        keeper, after, error = await self._begin(_AT_ONCE if self._hurries else pause)
        if after is None:
            if error is not None:
                raise error
            return pause
        async with self._engine.connect() as connection:
            senders = await self._walk.read(connection, after=after, most=PART)
        restored = 0
        for queue, part in (await self._by_queue(senders)).items():
            try:
                lost = await find_lost(queue, part, whole=True)
                await self._load(lost)
                restored += len(lost)
            except QUEUE_ERRORS as found:
                # In a cluster, other shards are served.
                error = found
        is_last = len(senders) < PART
        if is_last:
            self._rounds_at_once = max(self._rounds_at_once - 1, 0)
        self._hurries = self._rounds_at_once > 0 or (not is_last and restored > _MANY * PART)
        await keeper.end_patrol(0 if is_last else senders[-1].sender_id)
        if restored:
            # Usually few: those whose batch was accepted a moment ago.
            _log.info("heads_restored", senders=restored)
        if error is not None:
            raise error
        return _AT_ONCE if self._hurries else pause

    async def _begin(self, pause: timedelta) -> tuple[Queue, int | None, Exception | None]:
        """Return the shard that keeps the place, the place, and the error of the shards before it.

        The first shard keeps the place. While its node is gone, the next one that serves does, with
        a place of its own.
        """
        error: Exception | None = None
        for queue in self._queues:
            try:
                return queue, await queue.begin_patrol(pause), error
            except QUEUE_ERRORS as found:
                error = found
        if error is None:
            raise AssertionError("there is no shard")
        raise error

    async def _by_queue(
        self, senders: Sequence[ConcernedSender]
    ) -> Mapping[Queue, list[ConcernedSender]]:
        queues = await self._find_queues([one.sender_id for one in senders])
        parts: dict[Queue, list[ConcernedSender]] = {}
        for sender in senders:
            parts.setdefault(queues[sender.sender_id], []).append(sender)
        return parts
