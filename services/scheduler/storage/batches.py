"""The tables of batches and of their rejections."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final, cast

from sqlalchemy import BigInteger, ColumnElement, Select, case, select
from sqlalchemy import cast as sql_cast
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.scheduler.storage.bounded import search
from outbox_server.services.scheduler.storage.conditions import Leaf, column, condition, labels_of
from outbox_server.services.scheduler.storage.counted_states import has_counted
from outbox_server.shared.database.audit_events import RecordedChange, shortened_text
from outbox_server.shared.database.counts import JobCounts, batch_counts
from outbox_server.shared.database.models import Batch, BatchRejection
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.database.pauses import batch_is_paused, pause_lasts
from outbox_server.shared.durations import format_duration
from outbox_server.shared.filters.fields import FieldTest, Filter, required_value
from outbox_server.shared.filters.resources import ShownBatchState
from outbox_server.shared.intake.rows import RowRejection
from outbox_server.shared.states import BatchMode, BatchState, DuplicatePolicy, JobState

_MILLISECOND: Final = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A stored batch with its counts. In lists, long texts are left out."""

    batch_id: int
    user_id: str
    sender_id: int
    request_id: str
    subject: str | None
    body: str | None
    html: str | None
    start_at: datetime
    spacing_ms: int
    duplicates: DuplicatePolicy
    mode: BatchMode
    expire_after_ms: int | None
    state: BatchState
    accepted_count: int
    rejected_count: int
    duplicate_count: int
    suppressed_count: int
    created_at: datetime
    cancelled_at: datetime | None
    last_due_at: datetime | None
    email_column: str | None
    test: bool
    # When it was paused, and when the pause ends by itself. None means that it is not paused now.
    paused_at: datetime | None
    paused_until: datetime | None
    # Whether new due times are being written.
    respreading: bool
    revision: int
    counts: JobCounts
    name_column: str | None
    external_id: str | None
    labels: Mapping[str, str]
    # These are left out in lists.
    reply_to: str | None = None
    headers: Sequence[tuple[str, str]] = ()


def accepted_change(change: RecordedChange, batch: BatchRecord) -> RecordedChange:
    """Return `change` as the event of the audit log of a batch that it has accepted.

    It has no addresses and no variables. The subject of a single mail may be about its recipient,
    whom an erasure could no longer find here once the batch is purged.
    """
    after: dict[str, Any] = {
        "sender_id": str(batch.sender_id),
        "schedule_time": batch.start_at.isoformat(),
        "spacing": format_duration(batch.spacing_ms * _MILLISECOND),
        "accepted_count": batch.accepted_count,
        "rejected_count": batch.rejected_count,
        "duplicate_count": batch.duplicate_count,
        "suppressed_count": batch.suppressed_count,
    }
    if batch.expire_after_ms is not None:
        after["expire_after"] = format_duration(batch.expire_after_ms * _MILLISECOND)
    if batch.subject is not None and batch.accepted_count > 1:
        after["subject"] = shortened_text(batch.subject)
    if batch.test:
        after["test"] = True
    target = f"batches/{batch.batch_id}"
    return replace(change, target=target, user_id=batch.user_id, after=after)


_LISTED: Final = (
    Batch.id,
    Batch.user_id,
    Batch.sender_id,
    Batch.request_id,
    Batch.subject,
    Batch.start_at,
    Batch.spacing_ms,
    Batch.duplicates,
    Batch.mode,
    Batch.expire_after_ms,
    Batch.state,
    Batch.accepted_count,
    Batch.rejected_count,
    Batch.duplicate_count,
    Batch.suppressed_count,
    Batch.created_at,
    Batch.cancelled_at,
    Batch.last_due_at,
    Batch.email_column,
    Batch.name_column,
    Batch.external_id,
    Batch.labels,
    Batch.test,
    case((pause_lasts(), Batch.paused_at)).label("paused_at"),
    case((pause_lasts(), Batch.paused_until)).label("paused_until"),
    Batch.respreading,
    Batch.revision,
)
# The columns that lists leave out.
_LONG: Final = (Batch.body, Batch.html, Batch.reply_to, Batch.headers)


def _record(row: Any, counts: JobCounts) -> BatchRecord:
    return BatchRecord(
        batch_id=row.id,
        user_id=row.user_id,
        sender_id=row.sender_id,
        request_id=row.request_id,
        subject=row.subject,
        body=None,
        html=None,
        start_at=row.start_at,
        spacing_ms=row.spacing_ms,
        duplicates=DuplicatePolicy(row.duplicates),
        mode=BatchMode(row.mode),
        expire_after_ms=row.expire_after_ms,
        state=BatchState(row.state),
        accepted_count=row.accepted_count,
        rejected_count=row.rejected_count,
        duplicate_count=row.duplicate_count,
        suppressed_count=row.suppressed_count,
        created_at=row.created_at,
        cancelled_at=row.cancelled_at,
        last_due_at=row.last_due_at,
        email_column=row.email_column,
        test=row.test,
        paused_at=row.paused_at,
        paused_until=row.paused_until,
        respreading=row.respreading,
        revision=row.revision,
        counts=counts,
        name_column=row.name_column,
        external_id=row.external_id,
        labels=row.labels or {},
    )


def stored_headers(stored: Any) -> tuple[tuple[str, str], ...]:
    """Return the headers of a batch, from the column `headers`."""
    return tuple((name, text) for name, text in stored or ())


def _whole(row: Any, counts: JobCounts) -> BatchRecord:
    """Return a batch with what lists leave out."""
    return replace(
        _record(row, counts),
        body=row.body,
        html=row.html,
        reply_to=row.reply_to,
        headers=stored_headers(row.headers),
    )


async def read_batch(
    connection: AsyncConnection, batch_id: int, user_id: str | None
) -> BatchRecord | None:
    """Return a batch, or None if it does not exist or belongs to another user."""
    statement = owned_by(
        select(*_LISTED, *_LONG).where(Batch.id == batch_id),
        Batch.user_id,
        user_id,
    )
    row = (await connection.execute(statement)).one_or_none()
    if row is None:
        return None
    counts = await batch_counts(connection, [batch_id])
    return _whole(row, counts[batch_id])


def _shown_state(test: FieldTest) -> ColumnElement[bool]:
    cancelled = Batch.state == BatchState.CANCELLED
    has_open = has_counted({JobState.SCHEDULED})
    found = {
        ShownBatchState.CANCELLED: cancelled,
        ShownBatchState.ACTIVE: ~cancelled & has_open & ~pause_lasts(),
        ShownBatchState.DONE: ~cancelled & ~has_open,
        ShownBatchState.PAUSED: ~cancelled & has_open & pause_lasts(),
    }[ShownBatchState(cast(int, test.value))]
    return found if test.operator == "=" else ~found


_BATCH_LEAVES: Final[Mapping[str, Leaf]] = {
    "state": _shown_state,
    "sender_id": column(Batch.sender_id),
    "request_id": column(Batch.request_id),
    "external_id": column(Batch.external_id, nullable=True),
    "labels": labels_of(Batch.labels),
    "create_time": column(Batch.created_at),
    "schedule_time": column(Batch.start_at),
    "accepted_count": column(sql_cast(Batch.accepted_count, BigInteger)),
    "rejected_count": column(sql_cast(Batch.rejected_count, BigInteger)),
    "test": column(Batch.test),
}


async def list_batches(
    connection: AsyncConnection,
    user_id: str | None,
    tree: Filter | None,
    after_id: int,
    limit: int,
    *,
    descending: bool,
) -> tuple[Sequence[BatchRecord], int | None]:
    """Return the first `limit` batches after an id that match, in the order of ids.

    If there are fewer, although more may follow, the id where to continue is returned too.
    """
    after = Batch.id < after_id if descending else Batch.id > after_id
    listed: Any = select(*_LISTED).where(after)
    rows = owned_by(listed, Batch.user_id, user_id)
    sender_id = required_value(tree, "sender_id")[1]
    if sender_id is not None:
        rows = rows.where(Batch.sender_id == sender_id)
    request_id = required_value(tree, "request_id")[1]
    if request_id is not None and user_id is not None:
        rows = rows.where(Batch.request_id == request_id)
    matches = None if tree is None else condition(tree, _BATCH_LEAVES)
    found = await search(connection, rows, Batch.id, matches, limit, descending=descending)
    counts = await batch_counts(connection, [row.id for row in found.rows])
    return [_record(row, counts[row.id]) for row in found.rows], found.reached


async def read_watched(connection: AsyncConnection, ids: Collection[int]) -> dict[int, BatchRecord]:
    """Return these batches without `body` and `html`, which do not change."""
    rows = (await connection.execute(select(*_LISTED).where(Batch.id.in_(ids)))).all()
    counts = await batch_counts(connection, ids)
    return {row.id: _record(row, counts[row.id]) for row in rows}


async def batch_exists(connection: AsyncConnection, batch_id: int, user_id: str | None) -> bool:
    """Return whether the batch exists and belongs to this user. None means any user."""
    statement = owned_by(select(Batch.id).where(Batch.id == batch_id), Batch.user_id, user_id)
    return (await connection.execute(statement)).one_or_none() is not None


_REJECTION: Final[tuple[Any, ...]] = (
    BatchRejection.row_number,
    BatchRejection.column_name,
    BatchRejection.reason,
    BatchRejection.detail,
)
_REJECTION_LEAVES: Final[Mapping[str, Leaf]] = {
    "row_number": column(BatchRejection.row_number),
    "column": column(BatchRejection.column_name),
    "reason": column(BatchRejection.reason),
}


async def list_rejections(
    connection: AsyncConnection,
    batch_id: int,
    after_row: int,
    limit: int,
    tree: Filter | None = None,
    *,
    descending: bool = False,
) -> tuple[Sequence[RowRejection], int | None]:
    """Return the first `limit` rejections after row `after_row` that match.

    Check `batch_exists` before. If there are fewer, although more may follow, the row where to
    continue is returned too.
    """
    key = BatchRejection.row_number
    rows: Select[Any] = select(*_REJECTION).where(
        BatchRejection.batch_id == batch_id, key < after_row if descending else key > after_row
    )
    matches = None if tree is None else condition(tree, _REJECTION_LEAVES)
    found = await search(connection, rows, key, matches, limit, descending=descending)
    rejections = [
        RowRejection(row.row_number, row.column_name, row.reason, row.detail) for row in found.rows
    ]
    return rejections, found.reached


async def read_pause(
    connection: AsyncConnection, batch_id: int
) -> tuple[datetime | None, bool] | None:
    """Return until when a batch is paused, and whether it is because of new due times.

    Return None if it is not paused.
    """
    statement = select(Batch.respreading, Batch.paused_until).where(
        Batch.id == batch_id, batch_is_paused()
    )
    row = (await connection.execute(statement)).one_or_none()
    if row is None:
        return None
    return None if row.respreading else row.paused_until, row.respreading


async def read_expire_after(connection: AsyncConnection, batch_id: int) -> timedelta | None:
    """Return how long after their due times mails of the batch expire. None means never."""
    milliseconds = await connection.scalar(
        select(Batch.expire_after_ms).where(Batch.id == batch_id)
    )
    return None if milliseconds is None else timedelta(milliseconds=milliseconds)
