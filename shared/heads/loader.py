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
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.shared.database.engine import DATABASE_ERRORS, snapshot
from outbox_server.shared.gap import effective_gap
from outbox_server.shared.heads.concerned import Walk
from outbox_server.shared.heads.lives import Lives
from outbox_server.shared.heads.markers import delete_markers, mark_stale, read_abandoned
from outbox_server.shared.heads.patrol import Patrol
from outbox_server.shared.heads.rebuilding import Rebuild
from outbox_server.shared.heads.routes import Routes
from outbox_server.shared.heads.statements import (
    HEADS_STATEMENT,
    HISTORY_STATEMENT,
    shard_keys_statement,
)
from outbox_server.shared.heads.users import UserLoader, spans_of
from outbox_server.shared.queue.circuit_keys import CircuitKeys, user_key
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.queue import HEAD_SIZE, Queue, QueueFullError
from outbox_server.shared.queue.records import (
    ActiveLease,
    Head,
    PastEnd,
    RebuildEnd,
    brings_history,
)
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.sending_hours import SendingHours
from outbox_server.shared.settings import Settings

# A load that loses a race against a commit reads again. Each lost race means progress elsewhere.
_TRIES = 20
# Senders per statement and pipeline, which bounds the memory of a rebuild.
_CHUNK = 200
_DAY_MS = 24 * 60 * 60 * 1000
# When to load a sender again whose waiting mail is all paused.
_LOOK_AGAIN = timedelta(hours=1)

_log = structlog.get_logger(__name__)


class RebuildResult(StrEnum):
    """The result of rebuilding a shard that lacked heads."""

    COMPLETE = "complete"
    # Redis or the lock was lost again meanwhile.
    OVERTAKEN = "overtaken"
    # PostgreSQL failed, or Redis failed briefly.
    FAILED = "failed"


def _opening(hours: str | None, now: int) -> tuple[int, int] | None:
    """Return the opening that contains `now`, or the next one; None without sending hours."""
    if hours is None:
        return None
    sending_hours = SendingHours.from_text(hours)
    opens = sending_hours.opens(now)
    # No opening within two weeks: search again on the next day.
    return (now + _DAY_MS, now + _DAY_MS) if opens is None else (opens, sending_hours.closes(opens))


def _wake(first_end: timedelta | None, *, left_out: bool) -> timedelta | None:
    """Return the time until the sender must be loaded again, because the pause of a batch ends.

    `left_out`: all its waiting jobs are of paused batches. Without a next time, Redis would forget
    the sender, and the patrol would load it in each of its rounds.
    """
    if left_out:
        return _LOOK_AGAIN if first_end is None else min(first_end, _LOOK_AGAIN)
    return first_end


def _no_head(sender_id: int) -> Head:
    """Return an empty head, for a sender that PostgreSQL does not have: it is not visited again."""
    return Head(
        sender_id=sender_id,
        hourly_limit=1,
        gap=timedelta(0),
        max_in_flight=1,
        active=False,
        jobs=(),
        more=False,
    )


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
        # For single statements, which need no transaction and so half of the round trips.
        self._single = engine.execution_options(isolation_level="AUTOCOMMIT")
        self.queues = queues
        self.lives = Lives(engine)
        self._routes = Routes(queues)
        self._users = UserLoader(engine, self._routes, settings)
        self._patrol = Patrol(
            engine, queues, find_queues=self.find_queues, load=self._load_without_commit
        )
        self._window = settings.rate_window
        self._floor = settings.min_gap
        self._circuit_keys = CircuitKeys(
            SecretBox.from_settings(settings), override=settings.smtp_override
        )

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
            # So that the limits hold at once, before all senders are loaded.
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
                heads, markers = await self._read(connection, epochs, rows)
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

    async def _read(
        self, connection: AsyncConnection, epochs: Mapping[int, str], rows: Sequence[Row[Any]]
    ) -> tuple[list[Head], dict[int, list[int]]]:
        ends: dict[int, list[PastEnd]] = {}
        leases: dict[int, list[ActiveLease]] = {}
        fresh = {sender_id for sender_id, epoch in epochs.items() if brings_history(epoch)}
        if fresh:
            gaps = (effective_gap(row.min_gap_ms, self._floor) for row in rows if row.id in fresh)
            reach = max([self._window, *gaps])
            values = {"senders": list(fresh), "reach": reach}
            for row in await connection.execute(HISTORY_STATEMENT, values):
                if row.leased:
                    leases[row.sender_id] = [ActiveLease(*span[:2]) for span in spans_of(row)]
                else:
                    ends[row.sender_id] = [PastEnd(*span) for span in spans_of(row)]
                await asyncio.sleep(0)
        heads = []
        for row in rows:
            heads.append(
                self._head(row, tuple(ends.get(row.id, ())), tuple(leases.get(row.id, ())))
            )
            # A chunk with long heads takes 0.1 s, and mail is sent meanwhile.
            await asyncio.sleep(0)
        known = {row.id for row in rows}
        heads += [_no_head(sender_id) for sender_id in epochs if sender_id not in known]
        return heads, {row.id: row.markers or [] for row in rows}

    def _head(
        self, row: Row[Any], ends: tuple[PastEnd, ...], leases: tuple[ActiveLease, ...]
    ) -> Head:
        jobs = tuple(
            (JobRef(job_id, attempt + 1), due)
            for job_id, attempt, due in zip(
                row.ids or (), row.attempts or (), row.dues or (), strict=True
            )
        )
        return Head(
            sender_id=row.id,
            hourly_limit=row.hourly_limit,
            gap=effective_gap(row.min_gap_ms, self._floor),
            max_in_flight=row.max_in_flight,
            active=row.active,
            jobs=jobs[:HEAD_SIZE],
            more=len(jobs) > HEAD_SIZE,
            user=user_key(row.user_id),
            user_limited=bool(row.user_hourly_limit or row.user_min_gap_ms),
            endpoint=self._circuit_keys.of_sender(
                row.user_id,
                row.smtp_host,
                row.smtp_port,
                row.smtp_security,
                row.smtp_username,
                password=row.smtp_password,
                oauth2_credentials_id=row.oauth2_credentials_id,
            ),
            revision=row.revision,
            opening=_opening(row.sending_hours, row.now),
            cooldown=row.cooldown,
            paused_until_ms=row.paused_until or 0,
            wake=_wake(row.wake, left_out=row.left_out and not jobs),
            ends=ends,
            leases=leases,
        )

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
