"""All SQL of retention: removes old rows in small transactions, and counts them beforehand.

Every transaction holds one advisory lock, so that only one process removes rows at a time. The lock
ends with the transaction, even if the process dies. Rows that another transaction has locked are
skipped, so nothing waits for a removal, and a removal waits for nothing.

A finished job is removed with its attempts. The condition on its attempts matters if the batch was
cancelled while a mail of it was being sent: that attempt ended after the job's `finished_at`. The
limiter may need it after a loss of Redis.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Integer,
    and_,
    any_,
    bindparam,
    cast,
    delete,
    func,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import INTERVAL, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.lookups import is_looked_up
from outbox_server.shared.database.models import (
    Attempt,
    Batch,
    BatchCancellation,
    BatchCount,
    BatchRejection,
    CountDelta,
    EmailJob,
    JobChange,
    PurgedCount,
    UserRow,
)
from outbox_server.shared.states import PURGEABLE

# Any constant.
_ADVISORY_LOCK: Final = 7_402_311_916
# A removal waits for no row lock. This limit is for locks on whole tables, such as a migration's.
_LOCK_LIMIT: Final = "1s"
BEGINNING: Final = datetime(1, 1, 1, tzinfo=UTC)
_KEY: Final = ("batch_id", "sender_id", "hour", "state")
# The batch id in the counts of batches that were removed too.
_REMOVED_BATCHES: Final = 0


@dataclass(frozen=True, slots=True)
class RemovedJobs:
    """The rows that one transaction removed, and where the next one continues; None at the end."""

    jobs: int
    attempts: int
    next_from: datetime | None


@dataclass(frozen=True, slots=True)
class RemovedBatches:
    """The rows that one transaction removed, and where the next one continues; None at the end."""

    batches: int
    rejections: int
    next_after: int | None


@dataclass(frozen=True, slots=True)
class OldRows:
    """How many rows retention would remove that ended (or were accepted) in one month (UTC)."""

    month: datetime
    jobs: int = 0
    attempts: int = 0
    batches: int = 0
    rejections: int = 0


def _before() -> ColumnElement[datetime]:
    return func.statement_timestamp() - bindparam("older_than", type_=INTERVAL)


def _old_jobs() -> ColumnElement[bool]:
    """Return the condition of a job that may be removed. Its first part matches the index."""
    # The states are part of the statement's text: see shared/database/counts.py, `in_state`.
    states = [literal(state, Integer, literal_execute=True) for state in PURGEABLE]
    late = (
        select(Attempt.email_job_id)
        .where(is_looked_up(Attempt.email_job_id, EmailJob.id), Attempt.ended_at >= _before())
        .correlate(EmailJob)
        .exists()
    )
    return and_(EmailJob.state.in_(states), EmailJob.finished_at < _before(), ~late)


def _jobs_statement() -> Any:
    picked = (
        select(
            EmailJob.id,
            EmailJob.batch_id,
            EmailJob.sender_id,
            EmailJob.state,
            EmailJob.finished_at,
        )
        # The index still has the entries of removed rows until the next VACUUM: do not pass them
        # again.
        .where(_old_jobs(), EmailJob.finished_at >= bindparam("from"))
        .order_by(EmailJob.finished_at)
        .limit(bindparam("limit"))
        .with_for_update(skip_locked=True)
        .cte("picked")
    )
    attempts = (
        delete(Attempt)
        .where(is_looked_up(Attempt.email_job_id, picked.c.id))
        .returning(Attempt.email_job_id)
        .cte("gone_attempts")
    )
    jobs = (
        delete(EmailJob)
        .where(is_looked_up(EmailJob.id, picked.c.id))
        .returning(EmailJob.id)
        .cte("gone")
    )
    hour = func.date_trunc("hour", picked.c.finished_at)
    key = (picked.c.batch_id, picked.c.sender_id, hour, picked.c.state)
    sums = select(*key, func.count()).group_by(*key).order_by(*key)
    counted = _adding(sums)
    return select(
        select(func.count()).select_from(jobs).scalar_subquery().label("jobs"),
        select(func.count()).select_from(attempts).scalar_subquery().label("attempts"),
        select(func.max(picked.c.finished_at)).scalar_subquery().label("last"),
    ).add_cte(counted)


def _adding(sums: Any) -> Any:
    new = insert(PurgedCount).from_select([*_KEY, "n"], sums)
    return new.on_conflict_do_update(
        index_elements=list(_KEY), set_={"n": PurgedCount.n + new.excluded.n}
    ).cte("counted")


_REMOVE_JOBS: Final = _jobs_statement()


async def enter(connection: AsyncConnection) -> bool:
    """Begin a removal in this transaction. Return False if another process is removing rows."""
    await connection.execute(select(func.set_config("lock_timeout", _LOCK_LIMIT, True)))
    return bool(await connection.scalar(select(func.pg_try_advisory_xact_lock(_ADVISORY_LOCK))))


async def remove_jobs(
    connection: AsyncConnection, older_than: timedelta, start: datetime, limit: int
) -> RemovedJobs:
    """Remove the oldest jobs that finished since `start` and more than `older_than` ago."""
    row = (
        await connection.execute(
            _REMOVE_JOBS, {"older_than": older_than, "from": start, "limit": limit}
        )
    ).one()
    return RemovedJobs(row.jobs, row.attempts, row.last if row.jobs == limit else None)


def _old_batches() -> ColumnElement[bool]:
    """Return the condition of a batch that may be removed once it has no jobs any more.

    A batch whose counts are not folded yet is left to a later pass: a fold would write them again.
    """
    return and_(
        Batch.created_at < _before(),
        Batch.id.not_in(select(BatchCancellation.batch_id)),
        Batch.id.not_in(select(JobChange.batch_id)),
        Batch.id.not_in(select(CountDelta.batch_id)),
    )


def _has_jobs(*which: ColumnElement[bool]) -> ColumnElement[bool]:
    jobs = select(EmailJob.id).where(EmailJob.batch_id == Batch.id, *which)
    return jobs.correlate(Batch).exists()


async def remove_batches(
    connection: AsyncConnection, older_than: timedelta, after: int, page: int
) -> RemovedBatches:
    """Look at the next `page` batches by id, and remove those that are old and have no jobs.

    Rejections are removed first, at most `page` of them in one transaction.
    """
    seen = select(Batch.id, Batch.created_at).where(Batch.id > after).order_by(Batch.id).limit(page)
    rows = (await connection.execute(seen)).all()
    if not rows:
        return RemovedBatches(0, 0, None)
    last = rows[-1].id
    old = select(Batch.id).where(Batch.id > after, Batch.id <= last, _old_batches(), ~_has_jobs())
    ids = (
        (
            await connection.execute(
                old.with_for_update(skip_locked=True), {"older_than": older_than}
            )
        )
        .scalars()
        .all()
    )
    rejections = 0
    if ids:
        rejections = await _remove_rejections(connection, ids, page)
        if rejections == page:
            return RemovedBatches(0, rejections, after)
        await _remove_batches(connection, ids)
    more = len(rows) == page and await _is_old(connection, rows[-1].created_at, older_than)
    return RemovedBatches(len(ids), rejections, last if more else None)


async def _is_old(connection: AsyncConnection, time: datetime, older_than: timedelta) -> bool:
    """Return whether batches after this one may be old. Ids follow the times, except of uploads."""
    return bool(await connection.scalar(select(time < _before()), {"older_than": older_than}))


async def _remove_rejections(connection: AsyncConnection, ids: Any, limit: int) -> int:
    key = tuple_(BatchRejection.batch_id, BatchRejection.row_number)
    some = (
        select(BatchRejection.batch_id, BatchRejection.row_number)
        .where(BatchRejection.batch_id == any_(cast(list(ids), ARRAY(BigInteger))))
        .order_by(BatchRejection.batch_id, BatchRejection.row_number)
        .limit(limit)
    )
    gone = (
        delete(BatchRejection).where(key.in_(some)).returning(BatchRejection.batch_id).cte("gone")
    )
    by_user = (
        select(Batch.user_id, func.count().label("n"))
        .join(gone, gone.c.batch_id == Batch.id)
        .group_by(Batch.user_id)
        .cte("by_user")
    )
    # Rejections that were stored before the count existed are not in it.
    left = func.greatest(UserRow.stored_rejections_count - by_user.c.n, 0)
    counted = (
        update(UserRow)
        .where(UserRow.user_id == by_user.c.user_id)
        .values(stored_rejections_count=left)
        .cte("counted")
    )
    removed = select(cast(func.coalesce(func.sum(by_user.c.n), 0), BigInteger)).add_cte(counted)
    return int((await connection.execute(removed)).scalar_one())


async def _remove_batches(connection: AsyncConnection, ids: Any) -> None:
    these = any_(cast(list(ids), ARRAY(BigInteger)))
    moved = (
        delete(PurgedCount)
        .where(PurgedCount.batch_id == these)
        .returning(PurgedCount.sender_id, PurgedCount.hour, PurgedCount.state, PurgedCount.n)
        .cte("moved")
    )
    key = (
        literal(_REMOVED_BATCHES, BigInteger),
        moved.c.sender_id,
        moved.c.hour,
        moved.c.state,
    )
    total = cast(func.sum(moved.c.n), BigInteger)
    sums = select(*key, total).group_by(*key[1:]).order_by(*key[1:])
    await connection.execute(select(literal(1)).add_cte(_adding(sums)))
    await connection.execute(delete(BatchCount).where(BatchCount.batch_id == these))
    await connection.execute(delete(Batch).where(Batch.id == these))


async def count_old(connection: AsyncConnection, older_than: timedelta) -> list[OldRows]:
    """Return how many rows a removal would find now, by month, the oldest first.

    A batch counts if all of its jobs are gone or would be removed. It counts in the month in which
    it was accepted.
    """
    given = {"older_than": older_than}
    found: dict[datetime, dict[str, int]] = {}

    async def add(statement: Any, *names: str) -> None:
        for month, *numbers in await connection.execute(statement, given):
            row = found.setdefault(month, {})
            row.update(zip(names, numbers, strict=True))

    month = func.date_trunc("month", EmailJob.finished_at)
    await add(select(month, func.count()).where(_old_jobs()).group_by(month), "jobs")
    await add(
        select(month, func.count())
        .join(Attempt, Attempt.email_job_id == EmailJob.id)
        .where(_old_jobs())
        .group_by(month),
        "attempts",
    )
    in_month = func.date_trunc("month", Batch.created_at)
    whole = and_(_old_batches(), ~_has_jobs(~_old_jobs()))
    await add(select(in_month, func.count()).where(whole).group_by(in_month), "batches")
    await add(
        select(in_month, func.count())
        .join(BatchRejection, BatchRejection.batch_id == Batch.id)
        .where(whole)
        .group_by(in_month),
        "rejections",
    )
    return [OldRows(month, **found[month]) for month in sorted(found)]
