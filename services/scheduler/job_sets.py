"""Cancels, retries and reschedules the jobs that match a filter, in parts, for about a second.

What is left then is for the next call, which begins where this one has ended.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Final, TypeAlias

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.filters.fields import FieldTest, both
from outbox_server.services.scheduler.storage import job_sets as storage
from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.services.scheduler.storage.job_filters import JobFilter, JobPosition
from outbox_server.services.scheduler.storage.job_sets import ChangedJobs, NewTime
from outbox_server.shared.heads.loader import HeadLoader, load_soon
from outbox_server.shared.states import JobState
from outbox_server.shared.user_quotas import UserQuotas

# A part takes up to 0.3 s more, and then heads are loaded.
_TIME_S: Final = 1.0
# Heads that are not loaded within this time are loaded by the dispatchers.
_LOAD_LIMIT: Final = timedelta(seconds=0.5)

_Part: TypeAlias = Callable[[AsyncConnection, JobFilter, JobPosition], Awaitable[ChangedJobs]]
# Records a part that has changed jobs, in its transaction.
Record: TypeAlias = Callable[[AsyncConnection, ChangedJobs], Awaitable[None]]


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
        part_of_jobs = storage.count_part if count_only else storage.cancel_part
        return await self._in_parts(part_of_jobs, _in(which, JobState.SCHEDULED), after, record)

    async def retry(
        self, which: JobFilter, after: JobPosition, record: Record, *, count_only: bool
    ) -> ChangedJobs:
        """Return the failed jobs that match to SCHEDULED.

        Raises:
            ResourceExhausted: USER_WAITING_JOBS_EXCEEDED. Earlier parts stay changed.
        """
        part = partial(storage.retry_part, quotas=self._quotas)
        part_of_jobs: _Part = storage.count_part if count_only else part
        return await self._in_parts(part_of_jobs, _in(which, JobState.FAILED), after, record)

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
        part = partial(storage.reschedule_part, new=new)
        part_of_jobs: _Part = storage.count_part if count_only else part
        return await self._in_parts(part_of_jobs, _in(which, JobState.SCHEDULED), after, record)

    async def _in_parts(
        self, part: _Part, which: JobFilter, after: JobPosition, record: Record
    ) -> ChangedJobs:
        until = time.monotonic() + _TIME_S
        jobs, senders = 0, frozenset[int]()
        position: JobPosition | None = after
        while position is not None:

            async def step(
                connection: AsyncConnection, position: JobPosition = position
            ) -> ChangedJobs:
                done = await part(connection, which, position)
                if done.sender_ids:
                    await record(connection, done)
                return done

            done = await in_transaction(self._engine, step)
            jobs, senders = jobs + done.jobs, senders | done.sender_ids
            position = done.reached
            if time.monotonic() > until:
                break
        if senders:
            await load_soon(self._loader, sorted(senders), limit=_LOAD_LIMIT)
        return ChangedJobs(jobs, senders, position)


def _in(which: JobFilter, state: JobState) -> JobFilter:
    return replace(which, tree=both(which.tree, FieldTest("state", "=", int(state))))
