"""Ends the waiting jobs of a user to suppressed addresses, some in each transaction.

The rows of jobs have triggers that hold a lock of the events, so that a long transaction would
delay all readers of events. Jobs that are left between two parts are not sent, because a dispatcher
looks for suppressions before each attempt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import BigInteger, ColumnElement, any_, literal, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.cancelling import (
    SWEPT_AT_ONCE,
    EndedJobs,
    end_waiting,
    lock_batches,
)
from outbox_server.services.scheduler.storage.conditions import (
    is_addressed_to,
    is_to,
    senders_of,
)
from outbox_server.services.scheduler.storage.job_filters import JobFilter, JobPosition
from outbox_server.services.scheduler.storage.walking import walk_batches
from outbox_server.shared.database.cancellations import is_now
from outbox_server.shared.database.models import Batch, EmailJob
from outbox_server.shared.database.ownership import bind_call, owned_by
from outbox_server.shared.filters.fields import FieldTest
from outbox_server.shared.states import JobState

# If there are more jobs to one address, they are found by the batches of the user instead: most of
# them may not be waiting.
MOST_BY_INDEX: Final = 2_000
_WAITING: Final = FieldTest("state", "=", int(JobState.SCHEDULED))
_START: Final[JobPosition] = (0, 0)


@dataclass(frozen=True, slots=True)
class ByAddress:
    """The condition that a job goes to an address, by an index, and the same without an index."""

    by_index: ColumnElement[bool]
    by_row: ColumnElement[bool]


@dataclass(frozen=True, slots=True)
class WaitingJobs:
    """The jobs to end: some are found by an index, others by the batches of the user from `after`.

    None are left if there is no condition.
    """

    user_id: str
    by_index: tuple[ColumnElement[bool], ...]
    by_row: ColumnElement[bool] | None
    after: JobPosition = _START

    @property
    def left(self) -> bool:
        """Return whether there may be more."""
        return bool(self.by_index) or self.by_row is not None


@dataclass(frozen=True, slots=True)
class EndedPart:
    """What one transaction has ended, and what the next one continues with."""

    ended: EndedJobs
    rest: WaitingJobs


def to_address(user_id: str, address: str) -> ByAddress:
    """Return the conditions for one address."""
    return ByAddress(is_to(address, senders_of(user_id)), is_addressed_to(address))


async def waiting_to(
    connection: AsyncConnection, user_id: str, conditions: Sequence[ByAddress]
) -> WaitingJobs:
    """Return which of the jobs that match one of the conditions have to be ended."""
    few: list[ColumnElement[bool]] = []
    many: ColumnElement[bool] | None = None
    bind_call(user_id)
    for each in conditions:
        more = select(EmailJob.id).where(each.by_index).offset(MOST_BY_INDEX).limit(1)
        if (await connection.execute(more)).first() is None:
            few.append(each.by_index)
        else:
            many = each.by_row if many is None else many | each.by_row
    return WaitingJobs(user_id, tuple(few), many)


async def end_part(
    connection: AsyncConnection, jobs: WaitingJobs, limit: int | None = None
) -> EndedPart:
    """Move some waiting jobs to SUPPRESSED, at most `limit` (None: SWEPT_AT_ONCE)."""
    limit = limit or SWEPT_AT_ONCE
    if jobs.by_index:
        which, *others = jobs.by_index
        jobs_found = await _find_by_index(connection, jobs.user_id, which, limit)
        more = jobs.by_index if len(jobs_found) == limit else tuple(others)
        rest = WaitingJobs(jobs.user_id, more, jobs.by_row, jobs.after)
        if not jobs_found:
            return await end_part(connection, rest, limit)
    elif jobs.by_row is not None:
        which = jobs.by_row
        wanted = JobFilter(jobs.user_id, _WAITING)
        walked = await walk_batches(connection, wanted, which, jobs.after, limit)
        jobs_found = walked.found
        after = walked.found[-1] if len(jobs_found) == limit else walked.reached
        by_row = None if after is None else which
        rest = WaitingJobs(jobs.user_id, (), by_row, after or _START)
    else:
        return EndedPart(EndedJobs(0, (), 0), jobs)
    if not jobs_found:
        return EndedPart(EndedJobs(0, (), 0), rest)
    batch_ids = sorted({batch_id for batch_id, _ in jobs_found})
    await lock_batches(connection, Batch.id == any_(literal(batch_ids, ARRAY(BigInteger))))
    found = [job_id for _, job_id in jobs_found]
    these = EmailJob.id == any_(literal(found, ARRAY(BigInteger)))
    return EndedPart(await end_waiting(connection, these & which, JobState.SUPPRESSED), rest)


async def _find_by_index(
    connection: AsyncConnection, user_id: str, which: ColumnElement[bool], limit: int
) -> Sequence[JobPosition]:
    owned = owned_by(select(Batch.id).where(Batch.id == EmailJob.batch_id), Batch.user_id, user_id)
    waiting = which & is_now(JobState.SCHEDULED) & owned.correlate(EmailJob).exists()
    found = select(EmailJob.batch_id, EmailJob.id).where(waiting).limit(limit)
    return [(row.batch_id, row.id) for row in await connection.execute(found)]
