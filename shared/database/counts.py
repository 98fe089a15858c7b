"""Counts jobs by state: exact at any moment, at a cost independent of the number of jobs.

A count is the folded count plus the deltas that are not folded yet. One statement reads both from
one snapshot, so a concurrent fold, which moves rows from one to the other, changes no sum. A claim
writes no delta, so SCHEDULED means all open jobs there; the jobs in SENDING, always few, are
counted from their rows by a partial index. Waiting jobs whose rows are still being cancelled
(shared/database/cancellations.py) are moved from SCHEDULED to CANCELLED.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final, TypeAlias

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Integer,
    Select,
    Text,
    any_,
    bindparam,
    cast,
    func,
    literal,
    or_,
    select,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import (
    Batch,
    BatchCancellation,
    BatchCount,
    CountDelta,
    EmailJob,
    JobChange,
    Sender,
    SenderCount,
)
from outbox_server.shared.states import BatchState, JobChangeKind, JobState

# Used in place of a state, for jobs whose row is SCHEDULED and whose batch is cancelled.
_WAITS_CANCELLED: Final = 0
# A key, a state, and the number of jobs.
_Counts: TypeAlias = Select[int, int, int]
# What a statement reads of a table that has the columns `batch_id` and `sender_id`.
_OfTable: TypeAlias = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class JobCounts:
    """The number of jobs in each JobState; one field per state."""

    scheduled: int = 0
    sending: int = 0
    sent: int = 0
    failed: int = 0
    uncertain: int = 0
    cancelled: int = 0
    suppressed: int = 0
    expired: int = 0

    def __getitem__(self, state: JobState) -> int:
        """Return how many jobs are in `state`."""
        count: int = getattr(self, state.name.lower())
        return count

    @property
    def open(self) -> int:
        """Jobs that wait or are being sent."""
        return self.scheduled + self.sending

    @property
    def total(self) -> int:
        """All jobs."""
        return sum(self[state] for state in JobState)


async def batch_counts(
    connection: AsyncConnection, batch_ids: Iterable[int]
) -> dict[int, JobCounts]:
    """Return the counts of each batch from one snapshot; a batch without jobs has zeros."""
    return await _read_by_key(connection, _BATCH_COUNTS, batch_ids)


async def sender_counts(
    connection: AsyncConnection, sender_ids: Iterable[int]
) -> dict[int, JobCounts]:
    """Return the counts of each sender from one snapshot; a sender without jobs has zeros."""
    return await _read_by_key(connection, _SENDER_COUNTS, sender_ids)


async def user_counts(connection: AsyncConnection, user_id: str) -> JobCounts:
    """Return the sum over all senders of a user, including deleted ones, from one snapshot."""
    rows = await connection.execute(_USER_COUNTS, {"user_id": user_id})
    return _to_counts({state: n for _, state, n in rows})


async def _read_by_key(
    connection: AsyncConnection, statement: _Counts, ids: Iterable[int]
) -> dict[int, JobCounts]:
    found: dict[int, dict[int, int]] = {key: {} for key in ids}
    if not found:
        return {}
    for key, state, n in await connection.execute(statement, {"ids": list(found)}):
        found[key][state] = n
    return {key: _to_counts(by_state) for key, by_state in found.items()}


def _to_counts(by_state: Mapping[int, int]) -> JobCounts:
    counts = {state.name.lower(): by_state.get(state, 0) for state in JobState}
    counts["scheduled"] -= counts["sending"]
    moved = by_state.get(_WAITS_CANCELLED, 0)
    counts["scheduled"] -= moved
    counts["cancelled"] += moved
    return JobCounts(**counts)


def in_state(state: JobState) -> ColumnElement[bool]:
    """Return the condition that selects a state, in the form of the partial indexes.

    The number is part of the statement's text. If it were a bound value, the generic plan of a
    prepared statement could not use a partial index.
    """
    return EmailJob.state == literal(int(state), Integer, literal_execute=True)


def _sending() -> CTE:
    """Return all jobs in SENDING, of all senders, read by the partial index.

    It is materialized, or else the planner might read a batch's jobs by another index and filter.
    """
    jobs = select(EmailJob.sender_id, EmailJob.batch_id).where(in_state(JobState.SENDING))
    return jobs.cte("sending").prefix_with("MATERIALIZED")


def _being_cancelled(key: _OfTable, which: _OfTable, sending: CTE) -> tuple[_Counts, ...]:
    """Return the waiting jobs that are cancelled, but whose rows are not updated yet.

    Those of a cancelled batch are its open jobs minus SENDING.
    """
    state = literal(_WAITS_CANCELLED)
    waiting = int(JobState.SCHEDULED)
    of_batch = BatchCancellation.batch_id
    batches = key(BatchCancellation), which(BatchCancellation)
    return (
        select(batches[0], state, BatchCount.n)
        .select_from(BatchCancellation)
        .join(BatchCount, BatchCount.batch_id == of_batch)
        .where(batches[1], BatchCount.state == waiting),
        select(batches[0], state, CountDelta.n)
        .select_from(BatchCancellation)
        .join(CountDelta, CountDelta.batch_id == of_batch)
        .where(batches[1], CountDelta.state == waiting),
        select(batches[0], state, literal(-1))
        .select_from(BatchCancellation)
        .join(sending, sending.c.batch_id == of_batch)
        .where(batches[1]),
        # An older release that cancels the batch leaves its changes in place. They do not count any
        # more.
        select(key(JobChange), state, JobChange.n)
        .select_from(JobChange)
        .join(Batch, Batch.id == JobChange.batch_id)
        .where(
            which(JobChange),
            JobChange.kind == int(JobChangeKind.CANCEL),
            Batch.state == int(BatchState.ACTIVE),
        ),
    )


def _sum_up(*parts: _Counts) -> _Counts:
    """Return (key, state, n) from statements with these columns."""
    part = union_all(*parts).subquery("part")
    return select(
        part.c.key, part.c.state, cast(func.sum(part.c.n), BigInteger).label("n")
    ).group_by(part.c.key, part.c.state)


def _statement(stored: type[BatchCount | SenderCount], key: _OfTable, which: _OfTable) -> _Counts:
    """Return the statement that counts the jobs `which` by `key` and state.

    `stored` are the sums to which the deltas that are not folded yet are added.
    """
    sending = _sending()
    return _sum_up(
        select(key(stored).label("key"), stored.state, stored.n).where(which(stored)),
        select(key(CountDelta), CountDelta.state, CountDelta.n).where(which(CountDelta)),
        select(key(sending.c), literal(int(JobState.SENDING)), literal(1)).where(which(sending.c)),
        *_being_cancelled(key, which, sending),
    )


def _statement_by(stored: type[BatchCount | SenderCount], column: str) -> _Counts:
    wanted = any_(bindparam("ids", type_=ARRAY(BigInteger)))
    return _statement(stored, attrgetter(column), lambda of: getattr(of, column) == wanted)


def _user_statement() -> _Counts:
    wanted = select(Sender.id).where(Sender.user_id == bindparam("user_id"))
    everything = literal(0).label("key")
    return _statement(SenderCount, lambda _: everything, lambda of: of.sender_id.in_(wanted))


def _most_open_statement() -> Select[str, int, bool]:
    waiting = int(JobState.SCHEDULED)
    wanted = any_(bindparam("user_ids", type_=ARRAY(Text)))
    # Summed up first, because a sender may have many deltas. Then its user is looked up: a join
    # could compare each sum with each sender of the user.
    deltas = (
        select(CountDelta.sender_id, func.sum(CountDelta.n).label("n"))
        .where(CountDelta.state == waiting)
        .group_by(CountDelta.sender_id)
        .subquery("deltas")
    )
    owner = select(Sender.user_id).where(Sender.id == deltas.c.sender_id).scalar_subquery()
    owned = select(owner.label("user_id"), deltas.c.n).subquery("owned")
    parts = union_all(
        select(Sender.user_id, SenderCount.n)
        .join(SenderCount, SenderCount.sender_id == Sender.id)
        .where(Sender.user_id == wanted, SenderCount.state == waiting),
        select(owned.c.user_id, owned.c.n).where(owned.c.user_id == wanted),
        select(Sender.user_id, JobChange.n)
        .join(JobChange, JobChange.sender_id == Sender.id)
        .where(Sender.user_id == wanted, JobChange.kind == int(JobChangeKind.RETRY)),
    ).subquery("part")
    cancelling = or_(
        *(
            select(of.sender_id)
            .join(Sender, Sender.id == of.sender_id)
            .where(Sender.user_id == parts.c.user_id)
            .correlate(parts)
            .exists()
            for of in (BatchCancellation, JobChange)
        )
    )
    return select(
        parts.c.user_id,
        cast(func.sum(parts.c.n), BigInteger).label("n"),
        cancelling.label("cancelling"),
    ).group_by(parts.c.user_id)


# The open jobs of each of `user_ids` (see `JobCounts.open`), with those that are being cancelled or
# retried, and whether there may be such jobs. Users without any are missing.
MOST_OPEN_COUNTS: Final = _most_open_statement()
_BATCH_COUNTS: Final = _statement_by(BatchCount, "batch_id")
_SENDER_COUNTS: Final = _statement_by(SenderCount, "sender_id")
_USER_COUNTS: Final = _user_statement()
