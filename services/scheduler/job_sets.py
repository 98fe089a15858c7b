"""Cancels, retries and reschedules the jobs that match a filter, for about a second per call.

The matching jobs are found and stored in parts. If jobs are left after a second, the answer has a
token with which the next call continues. The rows of many jobs are written by a loop, which runs in
every scheduler. Only one process writes the rows of a batch at a time. If it dies, another
continues.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Final, TypeAlias

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.storage import job_changes, respreading
from outbox_server.services.scheduler.storage import job_sets as storage
from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.services.scheduler.storage.job_changes import NewTime
from outbox_server.services.scheduler.storage.job_filters import JobFilter, JobPosition
from outbox_server.services.scheduler.storage.job_sets import ChangedJobs, SetChange
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.filters.fields import FieldTest, both
from outbox_server.shared.heads.loader import HeadLoader, load_soon
from outbox_server.shared.loops import Loop
from outbox_server.shared.states import JobChangeKind
from outbox_server.shared.user_quotas import UserQuotas

# After this time no further part begins. The last part may take 0.3 s more; then heads are loaded.
_TIME_S: Final = 1.0
# Heads that are not loaded within this time are loaded by the dispatchers.
_LOAD_LIMIT: Final = timedelta(seconds=0.5)
# The pause of the loop while rows are left, such as those that another scheduler writes.
_BUSY: Final = timedelta(seconds=1)
# The pause otherwise: a scheduler that died may have left a change. A call in this process wakes
# the loop.
_IDLE: Final = timedelta(seconds=5)

# The pause of a call that waits for rows which another process writes.
_OTHERS_S: Final = 0.05

_WrittenPart: TypeAlias = Callable[[AsyncConnection], Awaitable[int | None]]
_Part: TypeAlias = Callable[[AsyncConnection, JobFilter, JobPosition], Awaitable[ChangedJobs]]
# Records a part that has changed jobs, in its transaction.
Record: TypeAlias = Callable[[AsyncConnection, ChangedJobs], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class RetriedJobs:
    """How many jobs wait again, and how many jobs of the request were skipped."""

    jobs: int
    skipped: int


class JobSets:
    """Changes all jobs that match a filter."""

    def __init__(
        self,
        engine: AsyncEngine,
        loader: HeadLoader,
        quotas: UserQuotas,
        *,
        wake_sweeper: Callable[[], None],
    ) -> None:
        """`quotas` are the defaults, for users without overrides."""
        self._engine = engine
        self._loader = loader
        self._quotas = quotas
        self._wake_sweeper = wake_sweeper
        # The senders whose heads are loaded first, because batches of them are held.
        self._stale: set[int] = set()
        self._loop = Loop("changing jobs", self._write_all, errors=DATABASE_ERRORS, retry=_BUSY)

    async def run(self, stop: asyncio.Event) -> None:
        """Write rows until `stop` is set. An error of PostgreSQL is logged, and repeated."""
        await self._loop.run(stop)

    async def _write_all(self) -> timedelta:
        stale, self._stale = self._stale, set()
        if stale:
            await load_soon(self._loader, sorted(stale), limit=_LOAD_LIMIT)
        while changes := await in_transaction(self._engine, job_changes.oldest_of_users):
            # Users take turns, so that no user waits for all rows of another.
            progress = False
            for change_id in changes:
                if self._loop.stopping:
                    return _BUSY
                ended = await self._write_part(change_id)
                progress |= ended != 0
                if ended:
                    await load_soon(self._loader, [ended], limit=_LOAD_LIMIT)
            if not progress:
                return _BUSY
        return _IDLE

    async def cancel(
        self, which: JobFilter, after: JobPosition, record: Record, *, count_only: bool
    ) -> ChangedJobs:
        """Cancel the waiting jobs that match."""
        if storage.is_about_batches(which.tree):
            part = partial(storage.cancel_batches_part, count_only=count_only)
            done = await self._in_parts(part, which, after, record)
            if done.sender_ids:
                self._wake_sweeper()
            return done
        change = SetChange(JobChangeKind.CANCEL)
        return await self._change(change, which, after, record, count_only=count_only)

    async def retry(
        self, which: JobFilter, after: JobPosition, record: Record, *, count_only: bool
    ) -> ChangedJobs:
        """Return the failed jobs that match to SCHEDULED.

        Raises:
            ResourceExhausted: USER_WAITING_JOBS_EXCEEDED. Earlier parts stay changed.
        """
        change = SetChange(JobChangeKind.RETRY, quotas=self._quotas)
        return await self._change(change, which, after, record, count_only=count_only)

    async def retry_all(
        self, which: JobFilter, job_ids: Sequence[int] | None, record: Record
    ) -> RetriedJobs:
        """Do the same, but change all jobs that match in this call, however long it takes.

        `job_ids` restricts it to some jobs.

        Raises:
            ResourceExhausted: USER_WAITING_JOBS_EXCEEDED. Earlier parts stay changed.
        """
        count = partial(storage.count_meant, which=which, job_ids=job_ids)
        meant = await in_transaction(self._engine, count)
        change = SetChange(JobChangeKind.RETRY, quotas=self._quotas, job_ids=job_ids)
        done = await self._change(
            change, which, which.start, record, count_only=False, time_s=math.inf
        )
        return RetriedJobs(done.jobs, max(meant - done.jobs, 0))

    async def reschedule(
        self,
        which: JobFilter,
        after: JobPosition,
        new: NewTime,
        record: Record,
        *,
        count_only: bool,
    ) -> ChangedJobs:
        """Give the waiting jobs that match another due time."""
        change = SetChange(JobChangeKind.RESCHEDULE, new)
        return await self._change(change, which, after, record, count_only=count_only)

    async def _change(
        self,
        change: SetChange,
        which: JobFilter,
        after: JobPosition,
        record: Record,
        *,
        count_only: bool,
        time_s: float | None = None,
    ) -> ChangedJobs:
        which = replace(which, tree=both(which.tree, FieldTest("state", "=", int(change.state))))
        one = storage.count_part if count_only else storage.change_part
        part = partial(one, change=change)
        return await self._in_parts(part, which, after, record, time_s)

    async def _in_parts(
        self,
        part: _Part,
        which: JobFilter,
        after: JobPosition,
        record: Record,
        time_s: float | None = None,
    ) -> ChangedJobs:
        until = time.monotonic() + (_TIME_S if time_s is None else time_s)
        jobs, senders = 0, frozenset[int]()
        position: JobPosition | None = after
        while position is not None:

            async def step(
                connection: AsyncConnection, position: JobPosition = position
            ) -> ChangedJobs:
                done = await part(connection, which, position)
                if done.sender_ids and not done.waits:
                    await record(connection, done)
                return done

            done = await in_transaction(self._engine, step)
            if done.waits:
                await self._write(done.sender_ids, until)
            jobs, senders = jobs + done.jobs, senders | done.sender_ids
            position = done.reached
            if time.monotonic() > until:
                break
        if senders:
            left = partial(job_changes.unwritten, sender_ids=senders)
            if await in_transaction(self._engine, left):
                self._stale |= senders
                if position is None:
                    # Otherwise the caller's next call would wait for the rows.
                    self._loop.wake()
            else:
                await load_soon(self._loader, sorted(senders), limit=_LOAD_LIMIT)
        return ChangedJobs(jobs, senders, position)

    async def _write(self, sender_ids: Collection[int], until: float) -> None:
        """Write stored changes and new times of some senders, until a time."""
        changes = partial(job_changes.unwritten, sender_ids=sender_ids)
        respreads = partial(respreading.unfinished_of, sender_ids=sender_ids)
        parts: list[_WrittenPart] = [
            partial(job_changes.write_part, change_id=change_id)
            for change_id in await in_transaction(self._engine, changes)
        ]
        parts += [
            partial(respreading.respread_part, batch_id=batch_id)
            for batch_id in await in_transaction(self._engine, respreads)
        ]
        progress = False
        for part in parts:
            ended: int | None = None
            while ended is None:
                if self._loop.stopping or time.monotonic() > until:
                    return
                ended = await in_transaction(self._engine, part)
                progress |= ended != 0
        if not progress:
            # Another process writes them.
            await asyncio.sleep(_OTHERS_S)

    async def _write_part(self, change_id: int) -> int | None:
        part = partial(job_changes.write_part, change_id=change_id)
        return await in_transaction(self._engine, part)
