"""Loads the heads of senders from PostgreSQL into Redis.

One operation serves intake, refill, pause and resume, the rebuild of a lost Redis, and healing. Its
order makes it correct: it reads the epoch, then one snapshot of PostgreSQL, and then applies the
head if the epoch has not changed. Every process that commits rows raises the epoch afterwards, so a
load that read too early is refused and reads again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from enum import StrEnum
from functools import partial
from typing import Any

import structlog
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.database.engine import DATABASE_ERRORS, snapshot
from outbox_server.shared.heads.concerned import Walk
from outbox_server.shared.heads.lives import Lives
from outbox_server.shared.heads.markers import delete_markers, mark_stale, read_abandoned
from outbox_server.shared.heads.patrol import Patrol
from outbox_server.shared.heads.reading import HeadReader
from outbox_server.shared.heads.rebuilding import Rebuild
from outbox_server.shared.heads.routes import Routes
from outbox_server.shared.heads.statements import HEADS_STATEMENT, shard_keys_statement
from outbox_server.shared.heads.users import UserLoader
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.queue import Queue, QueueFullError
from outbox_server.shared.queue.records import RebuildEnd, brings_history
from outbox_server.shared.settings import Settings

# A load that loses a race against a commit reads again. Each lost race means progress elsewhere.
_TRIES = 20
# Senders per statement and pipeline, which bounds the memory of a rebuild.
_CHUNK = 200

_log = structlog.get_logger(__name__)


class RebuildResult(StrEnum):
    """The result of rebuilding a shard that lacked heads."""

    COMPLETE = "complete"
    # Redis or the lock was lost again meanwhile.
    OVERTAKEN = "overtaken"
    # PostgreSQL failed, or Redis failed briefly.
    FAILED = "failed"


class HeadLoader:
    """Loads heads, after a change of what they depend on or when they are used up."""

    def __init__(
        self,
        engine: AsyncEngine,
        queues: Sequence[Queue],
        settings: Settings,
        *,
        on_rebuild: Callable[[RebuildResult], None] | None = None,
    ) -> None:
        """`on_rebuild` is called for each rebuild of a shard that Redis had lost."""
        self._on_rebuild = on_rebuild
        self._engine = engine
        # Single statements need no transaction, and so half of the round trips.
        self._single = engine.execution_options(isolation_level="AUTOCOMMIT")
        self.queues = queues
        self.lives = Lives(engine)
        self._routes = Routes(queues)
        self._users = UserLoader(engine, self._routes, settings)
        self._patrol = Patrol(
            engine, queues, find_queues=self.find_queues, load=self._load_without_commit
        )
        self._reader = HeadReader(settings)

    def queue_of(self, sender_id: int) -> Queue:
        """Return the shard of a sender, as far as this process knows it (`routes`)."""
        return self._routes.of(sender_id)

    def learn_routes(self, queue: Queue, sender_ids: Iterable[int]) -> None:
        """Remember that these senders were found in this shard."""
        for sender_id in sender_ids:
            self._routes.learn(sender_id, queue)

    async def find_queues(self, sender_ids: Sequence[int]) -> Mapping[int, Queue]:
        """Return the shards of senders, as PostgreSQL knows them."""
        if self._users.sharded:
            async with self._engine.connect() as connection:
                for row in await connection.execute(shard_keys_statement(sender_ids)):
                    self._routes.by_key(row.id, row.shard_key)
        return {sender_id: self._routes.of(sender_id) for sender_id in sender_ids}

    async def load_user(self, user_id: str, sender_ids: Sequence[int]) -> None:
        """Load the limits of a user, which were just changed, and its senders."""
        if sender_ids:
            # Load the limits first, so that they hold at once, before all senders are loaded.
            await self.load(sender_ids[:1], committed=True)
            queue = (await self.find_queues(sender_ids[:1]))[sender_ids[0]]
            await self._users.load(queue, [user_id], committed=True)
            await self.load(sender_ids, committed=True)

    async def load(self, sender_ids: Iterable[int], *, committed: bool) -> None:
        """Load the heads of these senders, and delete the markers that requested it.

        `committed`: the caller has just committed what the load must see (a batch, a pause).

        Raises:
            redis.exceptions.RedisError: Redis is unreachable; the markers stay for a later load.
            sqlalchemy.exc.DBAPIError: PostgreSQL is unreachable.
        """
        moved: list[int] = []
        failure: Exception | None = None
        for queue, ids in self._routes.grouped(sender_ids).items():
            try:
                for start in range(0, len(ids), _CHUNK):
                    chunk = ids[start : start + _CHUNK]
                    moved += await self._load_chunk(queue, chunk, committed=committed)
            except QUEUE_ERRORS as error:
                # The shards may be on different nodes: load the others first.
                failure = failure or error
        if moved:
            # Their shard is known now.
            await self.load(moved, committed=True)
        if failure is not None:
            raise failure

    async def _load_chunk(
        self, queue: Queue, sender_ids: list[int], *, committed: bool
    ) -> list[int]:
        """Load senders of one shard. Returns those that are in another shard."""
        again, full, moved = sender_ids, list[int](), list[int]()
        for _ in range(_TRIES):
            epochs = await queue.begin_load(again, committed=committed)
            life = queue.life
            full += [sender_id for sender_id in again if sender_id not in epochs]
            # Read heads and history from one snapshot: otherwise a job that begins to wait again
            # between the two statements would be in neither.
            fresh = [sender_id for sender_id, epoch in epochs.items() if brings_history(epoch)]
            if fresh and self._users.sharded:
                # Their sends from another shard until then are in PostgreSQL, or are not confirmed.
                await self._users.forget_elsewhere(queue, fresh)
            async with snapshot(self._engine) if fresh else self._single.connect() as connection:
                found = await connection.execute(HEADS_STATEMENT, {"senders": list(epochs)})
                rows = found.all()
                heads, markers = await self._reader.read(connection, epochs, rows)
            strangers = await self._find_strangers(queue, rows)
            if strangers:
                moved += strangers
                heads = [head for head in heads if head.sender_id not in strangers]
                markers = {one: ids for one, ids in markers.items() if one not in strangers}
            users = {
                row.user_id
                for row in rows
                if row.id not in strangers and self._users.needs_load(row)
            }
            if users:
                await self._users.load(queue, sorted(users), committed=False)
            again = await queue.load_heads(heads, epochs)
            done = [
                marker
                for sender_id, ids in markers.items()
                if sender_id not in again
                for marker in ids
            ]
            if done:
                async with self._single.connect() as connection:
                    await delete_markers(connection, done, queue, life)
            if not again:
                break
            committed = False
        else:
            _log.warning("heads_kept_moving", senders=again)
        if full:
            raise QueueFullError(f"Redis is out of memory: {len(full)} senders must wait")
        return moved

    async def _find_strangers(self, queue: Queue, rows: Sequence[Row[Any]]) -> list[int]:
        """Return the senders of another shard, and remove them from this one."""
        for user_id in {row.user_id for row in rows if self._users.needs_route(row)}:
            await self._users.route(user_id)
        routed = [row.id for row in rows if self._users.needs_route(row)]
        if routed:
            await self.find_queues(routed)
        strangers = [
            row.id
            for row in rows
            if (
                self._routes.of(row.id)
                if row.shard_key is None
                else self._routes.by_key(row.id, row.shard_key)
            )
            is not queue
        ]
        if strangers:
            await self._forget(queue, strangers)
        return strangers

    async def _forget(self, queue: Queue, sender_ids: Sequence[int]) -> None:
        """Remove senders from the wrong shard. The caller loads them into the right one."""
        # The markers are for the case that this process dies before the load.
        async with self._engine.begin() as connection:
            await mark_stale(connection, sender_ids)
        await queue.forget_senders(sender_ids)

    async def load_requested(self, queue: Queue, sender_ids: Sequence[int]) -> None:
        """Load senders that a claim on a shard asked for."""
        queues = await self.find_queues(sender_ids)
        moved = [sender_id for sender_id in sender_ids if queues[sender_id] is not queue]
        if moved:
            # Otherwise the shard would ask for them again and again.
            await self._forget(queue, moved)
        await self.load(sender_ids, committed=False)

    async def load_abandoned(self) -> Sequence[int]:
        """Load the heads of senders with an old marker, which a process left when it died."""
        async with self._engine.connect() as connection:
            senders = await read_abandoned(connection, _CHUNK)
        await self.load(senders, committed=True)
        return senders

    async def patrol(self, pause: timedelta) -> timedelta:
        """Load the senders of the next part of the patrol that Redis has lost (`Patrol.step`)."""
        return await self._patrol.step(pause)

    def hurry_patrol(self) -> None:
        """Let the patrol go through all senders at once."""
        self._patrol.hurry()

    async def rebuild(self, queue: Queue) -> bool:
        """Load all senders of a shard that Redis lost completely or in part.

        It visits the senders with waiting jobs, and loads those first whose jobs are due. A sender
        with only a history is loaded when it is used. Returns whether the shard is complete. False
        means that another process rebuilds it, that Redis was lost again meanwhile, or that another
        server is in use.
        """
        token = await queue.begin_rebuild()
        if token is None:
            return False
        try:
            if not await self.lives.begin(queue, token):
                await queue.give_up_rebuild(token)
                return False
            return await self._rebuild(queue, token)
        except Exception:
            # So the next try, here or in another process, need not wait until the lock expires.
            with suppress(*QUEUE_ERRORS):
                await queue.give_up_rebuild(token)
                # A failed rebuild of a complete shard did no harm, and is not counted.
                if not (await queue.count_ready_jobs()).complete:
                    self._rebuilt(RebuildResult.FAILED)
            raise

    async def _rebuild(self, queue: Queue, token: str) -> bool:
        walk = Walk(shards=len(self.queues), shard=queue.shard)
        load = partial(self._load_of_shard, queue)
        rebuild = Rebuild(self._engine, queue, walk, token, chunk=_CHUNK, load=load)
        await rebuild.run()
        loaded = rebuild.loaded
        if rebuild.overtaken:
            _log.warning("rebuild_overtaken", shard=queue.shard)
            self._rebuilt(RebuildResult.OVERTAKEN)
            return False
        end = await queue.finish_rebuild(token)
        if end is RebuildEnd.STILL_COMPLETE:
            return True
        whole = end is RebuildEnd.RESTORED
        if loaded:
            _log.warning("shard_rebuilt", shard=queue.shard, senders=loaded, whole=whole)
            self._rebuilt(RebuildResult.COMPLETE if whole else RebuildResult.OVERTAKEN)
        return whole

    async def _load_of_shard(self, queue: Queue, sender_ids: Sequence[int]) -> None:
        self.learn_routes(queue, sender_ids)
        await self.load(sender_ids, committed=False)

    async def _load_without_commit(self, sender_ids: Sequence[int]) -> None:
        await self.load(sender_ids, committed=False)

    def _rebuilt(self, result: RebuildResult) -> None:
        if self._on_rebuild is not None:
            self._on_rebuild(result)


async def load_soon(
    loader: HeadLoader, sender_ids: Iterable[int], *, limit: timedelta = timedelta(seconds=3)
) -> bool:
    """Load heads after a commit, within `limit`; False if Redis or PostgreSQL fails or is slow.

    The commit is valid either way, and its marker causes the load later.
    """
    return await soon(loader.load(sender_ids, committed=True), sender_ids, limit)


async def load_user_soon(
    loader: HeadLoader,
    user_id: str,
    sender_ids: Sequence[int],
    *,
    limit: timedelta = timedelta(seconds=3),
) -> bool:
    """Load a user's limits and its senders after a commit, like `load_soon`."""
    return await soon(loader.load_user(user_id, sender_ids), sender_ids, limit)


async def soon(
    load: Coroutine[Any, Any, None],
    sender_ids: Iterable[int],
    limit: timedelta = timedelta(seconds=3),
) -> bool:
    """Run what brings a commit into Redis, within `limit`, and return whether it succeeded."""
    from redis.exceptions import RedisError  # noqa: PLC0415 - the driver stays inside shared.queue

    try:
        async with asyncio.timeout(limit.total_seconds()):
            await load
    except (RedisError, *DATABASE_ERRORS) as error:
        _log.warning("load_postponed", senders=list(sender_ids), error=type(error).__name__)
        return False
    return True
