"""Loads the limits of users into Redis, in the way of `shared.heads.loader`.

From the beginning of a load on, no sender of the user may send. So a claim that the history does
not show is not confirmed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.shared.database.engine import snapshot
from outbox_server.shared.heads.routes import Routes
from outbox_server.shared.heads.statements import (
    routing_statement,
    senders_of_users_statement,
    user_history_statement,
    user_limits_statement,
)
from outbox_server.shared.queue.circuit_keys import shard_key, user_key
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.queue import Queue, QueueFullError
from outbox_server.shared.queue.records import ActiveLease, PastEnd, UserHead, brings_history
from outbox_server.shared.queue.user_limits import UserSendLimits
from outbox_server.shared.settings import Settings

# The tries of one load, as for heads: each lost race means progress elsewhere.
_TRIES = 20
_log = structlog.get_logger(__name__)


def spans_of(row: Row[Any]) -> list[tuple[JobRef, timedelta, bool]]:
    """Return the ends or leases in a row of a history."""
    each = zip(row.email_job_id, row.attempt, row.ms, row.counted, strict=True)
    return [
        (JobRef(job_id, attempt), timedelta(milliseconds=ms), counted)
        for job_id, attempt, ms, counted in each
    ]


class UserLoader:
    """Loads the limits of users, and moves their senders into one shard."""

    def __init__(self, engine: AsyncEngine, routes: Routes, settings: Settings) -> None:
        self._engine = engine
        self._routes = routes
        self._window = settings.rate_window
        self._everyone = UserSendLimits.from_settings(settings)

    @property
    def sharded(self) -> bool:
        """Whether there is more than one shard."""
        return len(self._routes.queues) > 1

    def limits_of(self, row: Any) -> UserSendLimits:
        """Return the limits of the user of a row of `HEADS_STATEMENT`."""
        return self._everyone.overridden(row.user_hourly_limit, row.user_min_gap_ms)

    def needs_load(self, row: Any) -> bool:
        """Whether a load of a sender must load the limits of its user first."""
        return bool(self._everyone or self.limits_of(row))

    def needs_route(self, row: Any) -> bool:
        """Whether a sender must be moved into the shard of its user first."""
        return self.sharded and row.shard_key is None and bool(self.limits_of(row))

    async def route(self, user_id: str) -> Sequence[int]:
        """Give the senders of a user one shard for all, and return those that had none before."""
        key = shard_key(user_id)
        async with self._engine.begin() as connection:
            found = await connection.execute(routing_statement(user_id, key))
            moved: list[int] = list(found.scalars())
        if await self._forget_elsewhere(dict.fromkeys(moved, key)):
            # Their sends are not in the history of the user's limiter.
            await self._routes.queues[key % len(self._routes.queues)].forget_user(user_key(user_id))
        if moved:
            _log.info("senders_moved_to_the_shard_of_their_user", senders=len(moved))
        return moved

    async def forget_elsewhere(self, queue: Queue, sender_ids: Sequence[int]) -> int:
        """Remove senders of this shard from the shards of their ids. Return how many were there."""
        found = 0
        by_queue: dict[Queue, list[int]] = {}
        for sender_id in sender_ids:
            if (old := self._routes.by_id(sender_id)) is not queue:
                by_queue.setdefault(old, []).append(sender_id)
        for old, ids in by_queue.items():
            found += await old.forget_senders(ids)
        return found

    async def _forget_elsewhere(self, keys: Mapping[int, int]) -> int:
        by_queue: dict[Queue, list[int]] = {}
        for sender_id, key in keys.items():
            queue = self._routes.by_key(sender_id, key)
            by_queue.setdefault(queue, []).append(sender_id)
        found = 0
        for queue, ids in by_queue.items():
            found += await self.forget_elsewhere(queue, ids)
        return found

    async def load(self, queue: Queue, user_ids: Sequence[str], *, committed: bool) -> None:
        """Load the limits of users, whose senders are in the shard `queue`.

        `committed`: the caller has just committed what the load must see.

        Raises:
            QueueFullError: Redis is out of memory.
        """
        by_key = {user_key(user_id): user_id for user_id in user_ids}
        again = list(by_key)
        for _ in range(_TRIES):
            epochs = await queue.begin_user_loads(again, committed=committed)
            if len(epochs) < len(again):
                raise QueueFullError("Redis is out of memory: the limits of a user must wait")
            users = {by_key[key]: brings_history(epoch) for key, epoch in epochs.items()}
            fresh = [user_id for user_id, is_fresh in users.items() if is_fresh]
            if fresh and self.sharded:
                # Their sends from another shard until then are in PostgreSQL, or are not confirmed.
                async with self._engine.connect() as connection:
                    found = await connection.execute(senders_of_users_statement(fresh))
                    keys = {row.id: row.shard_key for row in found}
                await self._forget_elsewhere(keys)
            async with snapshot(self._engine) as connection:
                heads = await self._read(connection, list(users), fresh)
            again = await queue.load_users(heads, epochs)
            if not again:
                return
            committed = False
        _log.warning("user_limits_kept_moving", users=len(again))

    async def _read(
        self, connection: AsyncConnection, user_ids: Sequence[str], fresh: Sequence[str]
    ) -> list[UserHead]:
        found = await connection.execute(user_limits_statement(user_ids))
        limits = {row.user_id: (row.hourly_limit, row.min_gap_ms) for row in found}
        ends: dict[str, tuple[PastEnd, ...]] = {}
        leases: dict[str, tuple[ActiveLease, ...]] = {}
        if fresh:
            given = (limits.get(user_id, (None, None)) for user_id in fresh)
            gaps = (self._everyone.overridden(*one).gap for one in given)
            reach = max([self._window, *gaps])
            for row in await connection.execute(user_history_statement(fresh, reach)):
                if row.leased:
                    leases[row.user_id] = tuple(ActiveLease(*one[:2]) for one in spans_of(row))
                else:
                    ends[row.user_id] = tuple(PastEnd(*one) for one in spans_of(row))
        heads = []
        for user_id in user_ids:
            hourly_limit, gap_ms = limits.get(user_id, (None, None))
            gap = None if gap_ms is None else timedelta(milliseconds=gap_ms)
            history = ends.get(user_id, ()), leases.get(user_id, ())
            heads.append(UserHead(user_key(user_id), hourly_limit, gap, *history))
        return heads
