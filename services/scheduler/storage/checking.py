"""Checks a batch against what is stored, as an intake does, and stores nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, cast

import psycopg
from sqlalchemy import func, select

from outbox_server.services.scheduler.storage.batches import BatchRecord
from outbox_server.services.scheduler.storage.intake import IntakeStore, IntakeTransaction
from outbox_server.services.scheduler.storage.new_batches import (
    BegunBatch,
    FinishedBatch,
    IntakeCounts,
    IntakeSender,
)
from outbox_server.services.scheduler.storage.spreading import Spread
from outbox_server.shared.database.audit_events import RecordedChange
from outbox_server.shared.database.counts import JobCounts
from outbox_server.shared.database.models import Sender
from outbox_server.shared.intake.batch_options import BatchOptions
from outbox_server.shared.quotas.storage import check_waiting_jobs, room_for_rejections
from outbox_server.shared.states import BatchState
from outbox_server.shared.user_quotas import UserQuotas


class CheckStore(IntakeStore):
    """Reads what an intake needs. Its transactions can write nothing."""

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[IntakeTransaction]:
        """Open a transaction that PostgreSQL lets write nothing."""
        async with self._engine.connect() as connection:
            await connection.execution_options(postgresql_readonly=True)
            raw = await connection.get_raw_connection()
            driver = cast(psycopg.AsyncConnection[Any], raw.driver_connection)
            yield CheckTransaction(connection, driver, self._quotas, self._ids)


class CheckTransaction(IntakeTransaction):
    """The read-only transaction of an intake that only checks: it takes no locks either."""

    async def insert_batch(
        self,
        options: BatchOptions,
        user_id: str,
        variable_names: Sequence[str],
        email_column: str = "",
        trace_parent: str | None = None,
    ) -> BegunBatch | None:
        """Return when the batch would begin. It has no id."""
        del user_id, variable_names, email_column, trace_parent
        now = (await self._connection.execute(select(func.now()))).scalar_one()
        return BegunBatch(0, max(options.schedule_time or now, now), now)

    async def begin_spread(self) -> None:
        """Do nothing: no job is stored."""

    async def spread(self, spread: Spread, expire_after: timedelta | None) -> None:
        """Do nothing: no job is stored."""

    async def copy_jobs(
        self,
        count: int,
        lines_from: Callable[[int], Iterable[bytes]],
        *,
        spread: bool = False,
        tagged: bool = False,
    ) -> None:
        """Do nothing: no job is stored."""

    async def copy_rejections(self, lines: Iterable[bytes]) -> None:
        """Do nothing: no rejection is stored."""

    async def finish(
        self,
        begun: BegunBatch,
        sender: IntakeSender,
        counts: IntakeCounts,
        *,
        last_due: datetime | None,
        spacing: timedelta,
        request_hash: bytes,
        quotas: UserQuotas,
        row_labels: bool = False,
    ) -> FinishedBatch | None:
        """Check what an intake checks at its end.

        Raises:
            ResourceExhausted: USER_WAITING_JOBS_EXCEEDED.
        """
        del begun, last_due, spacing, request_hash, row_labels
        if counts.accepted:
            await check_waiting_jobs(self._connection, sender.user_id, counts.accepted, quotas)
        there = select(Sender.id).where(Sender.id == sender.sender_id, Sender.deleted_at.is_(None))
        if (await self._connection.execute(there)).one_or_none() is None:
            return None
        room = await room_for_rejections(self._connection, sender.user_id, quotas)
        return FinishedBatch(counts, max(counts.rejected - room, 0))

    async def record(self, change: RecordedChange) -> None:
        """Do nothing: nothing has changed."""


def unstored_batch(
    options: BatchOptions,
    begun: BegunBatch,
    counts: IntakeCounts,
    *,
    user_id: str,
    email_column: str,
    spacing: timedelta,
    last_due: datetime | None,
) -> BatchRecord:
    """Return a batch as it would be stored."""
    return BatchRecord(
        batch_id=begun.batch_id,
        user_id=user_id,
        sender_id=options.sender_id,
        request_id=options.request_id,
        subject=options.subject,
        body=options.body,
        html=options.html,
        start_at=begun.start_at,
        spacing_ms=round(spacing / timedelta(milliseconds=1)),
        duplicates=options.duplicates,
        mode=options.mode,
        expire_after_ms=options.expire_after_ms,
        state=BatchState.ACTIVE,
        accepted_count=counts.accepted,
        rejected_count=counts.rejected,
        duplicate_count=counts.duplicate,
        suppressed_count=counts.suppressed,
        created_at=begun.accepted_at,
        cancelled_at=None,
        last_due_at=last_due,
        email_column=email_column or None,
        test=options.test,
        counts=JobCounts(scheduled=counts.accepted),
        name_column=options.head.name_column or None,
        external_id=options.external_id or None,
        labels=options.labels,
        reply_to=options.reply_to,
        headers=options.headers,
        paused_at=None,
        paused_until=None,
        respreading=False,
        revision=1,
    )
