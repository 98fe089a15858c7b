"""Loads the heads of senders that a claim found missing, and rebuilds shards that Redis lost."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import structlog

from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.queue.records import Claimed

_log = structlog.get_logger(__name__)


class HeadLoads:
    """Begins loads in tasks of their own: senders that are loaded go on meanwhile."""

    def __init__(
        self, loader: HeadLoader, spawn: Callable[[Coroutine[Any, Any, None]], None]
    ) -> None:
        """`spawn` runs a coroutine in a task."""
        self._loader = loader
        self._spawn = spawn
        # The shards that this dispatcher is rebuilding.
        self._rebuilding: set[int] = set()

    def begin(self, queue: Queue, claimed: Claimed) -> None:
        """Begin the loads that a claim asked for."""
        if claimed.lost or claimed.provisional:
            self.begin_rebuild(queue)
        if claimed.loads:
            self.begin_load(queue, claimed.loads)

    def begin_rebuild(self, queue: Queue) -> None:
        """Begin to load all heads of a shard, unless this dispatcher does so already."""
        if queue.shard not in self._rebuilding:
            self._rebuilding.add(queue.shard)
            self._spawn(self._rebuild(queue))

    def begin_load(self, queue: Queue, sender_ids: Sequence[int]) -> None:
        """Begin to load the heads of these senders."""
        self._spawn(self._load(queue, sender_ids))

    async def _rebuild(self, queue: Queue) -> None:
        try:
            await self._loader.rebuild(queue)
        except (*QUEUE_ERRORS, *DATABASE_ERRORS) as error:
            _log.warning("rebuild_failed", shard=queue.shard, error=type(error).__name__)
        finally:
            self._rebuilding.discard(queue.shard)

    async def _load(self, queue: Queue, sender_ids: Sequence[int]) -> None:
        try:
            await self._loader.load_requested(queue, sender_ids)
        except (*QUEUE_ERRORS, *DATABASE_ERRORS) as error:
            # A later claim asks again, once the load is overdue.
            _log.warning("load_failed", senders=len(sender_ids), error=type(error).__name__)
