"""Stores a batch in one transaction: the row of the batch, its jobs by COPY, then the counts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final, cast

import psycopg
import structlog
from sqlalchemy import (
    and_,
    bindparam,
    delete,
    exists,
    func,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.dialects.postgresql import insert as insert_or_ignore
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.storage.new_batches import (
    BegunBatch,
    FinishedBatch,
    IntakeCounts,
    IntakeSender,
    KnownRequest,
    batch_values,
    request_lock,
)
from outbox_server.services.scheduler.storage.spreading import (
    COPY_SPREAD_JOBS,
    Spread,
    create_spread_jobs,
    move_spread_jobs,
)
from outbox_server.services.scheduler.storage.suppressions import (
    has_erased,
    lock_suppressions,
    suppressed_among,
)
from outbox_server.shared.callers import next_part
from outbox_server.shared.database.audit_events import RecordedChange, record_change
from outbox_server.shared.database.count_deltas import count_accepted
from outbox_server.shared.database.erased_keys import erased_key
from outbox_server.shared.database.models import (
    Batch,
    EmailJob,
    Sender,
    Suppression,
    UserRow,
)
from outbox_server.shared.database.ownership import owned_by
from outbox_server.shared.database.recipient_keys import exact_job_key, folded_job_key
from outbox_server.shared.errors import Unavailable
from outbox_server.shared.heads.markers import mark_stale
from outbox_server.shared.id_source import ID_TRIES, IdSource
from outbox_server.shared.intake.batch_options import BatchOptions
from outbox_server.shared.quotas.storage import (
    check_waiting_jobs,
    lock_user,
    read_quotas,
    store_rejections,
)
from outbox_server.shared.states import SuppressionForm
from outbox_server.shared.user_quotas import UserQuotas

# A suppression can be seen only some time after its `created_at`.
_SLACK: Final = timedelta(minutes=1)
_MILLISECOND: Final = timedelta(milliseconds=1)
# How many addresses are compared with the suppressions before other calls run.
_COMPARED_AT_ONCE: Final = 500
# How long a call waits for another call with the same request_id. It is below the usual deadline of
# a call.
_LOCK_LIMIT: Final = "20s"
# The transaction waits for the chunks of an upload, which may be slow. Its rate has a limit of its
# own (`shared.intake.upload_rate`); this one is for a host that has vanished.
_IDLE_LIMIT: Final = "2h"
COPY_JOBS: Final = (
    "COPY email_jobs (id, batch_id, sender_id, scheduled_at, expires_at, row_number, recipient, "
    "recipient_key, address_key, variables) FROM STDIN"
)
# Only rows with ids or labels are copied with these columns.
COPY_TAGGED_JOBS: Final = COPY_JOBS.replace(")", ", external_id, external_key, labels)")
_COPY_REJECTIONS: Final = (
    "COPY batch_rejections (batch_id, row_number, column_name, reason, detail) FROM STDIN"
)

_log = structlog.get_logger("outbox.intake")


class IntakeStore:
    """Reads what an intake needs before it begins, and opens its transaction."""

    def __init__(
        self, engine: AsyncEngine, quotas: UserQuotas, ids: IdSource | None = None
    ) -> None:
        """`quotas` are the defaults, for users without overrides."""
        self._engine = engine
        self._quotas = quotas
        self._ids = ids or IdSource()

    async def look_up(
        self, sender_id: int, request_id: str, user_id: str | None
    ) -> tuple[IntakeSender, KnownRequest | None] | None:
        """Return the sender, even if it is deleted, and the batch with this `request_id`.

        Return None if the sender does not exist or belongs to another user.
        """
        request = and_(Batch.user_id == Sender.user_id, Batch.request_id == request_id)
        statement = owned_by(
            select(
                Sender.user_id,
                Sender.deleted_at,
                Sender.email,
                UserRow.sender_domains,
                Batch.id,
                Batch.request_hash,
            )
            .join(Batch, request, isouter=True)
            .join(UserRow, UserRow.user_id == Sender.user_id, isouter=True)
            .where(Sender.id == sender_id),
            Sender.user_id,
            user_id,
        )
        async with self._engine.connect() as connection:
            row = (await connection.execute(statement)).one_or_none()
        if row is None:
            return None
        known = None if row.id is None else KnownRequest(row.id, row.request_hash)
        deleted = row.deleted_at is not None
        domains = row.sender_domains or ()
        return IntakeSender(sender_id, row.user_id, deleted, row.email, domains), known

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[IntakeTransaction]:
        """Open the transaction. It is committed at the end of the block, or rolled back."""
        async with self._engine.begin() as connection:
            raw = await connection.get_raw_connection()
            driver = cast(psycopg.AsyncConnection[Any], raw.driver_connection)
            try:
                yield IntakeTransaction(connection, driver, self._quotas, self._ids)
            except psycopg.OperationalError:
                # COPY bypasses SQLAlchemy, so the pool does not notice a closed connection.
                if driver.closed:
                    await connection.invalidate()
                raise


class IntakeTransaction:
    """The open transaction of an intake."""

    def __init__(
        self,
        connection: AsyncConnection,
        driver: psycopg.AsyncConnection[Any],
        default_quotas: UserQuotas,
        ids: IdSource,
    ) -> None:
        self._connection = connection
        self._default_quotas = default_quotas
        self._ids = ids
        # Number of jobs that wait in the temporary table of a spread batch.
        self._unplaced = 0
        # psycopg's connection, for COPY, which SQLAlchemy lacks. It has the same transaction.
        self._driver = driver
        self._erased: bool | None = None

    async def insert_batch(
        self,
        options: BatchOptions,
        user_id: str,
        variable_names: Sequence[str],
        email_column: str = "",
        trace_parent: str | None = None,
    ) -> BegunBatch | None:
        """Write the row of the batch. Return None if a batch with this `request_id` exists.

        If another intake with the same `request_id` is open, this waits for its end.

        Raises:
            Unavailable: REQUEST_IN_PROGRESS: it waited too long.
        """
        statement = (
            insert_or_ignore(Batch)
            .values(
                id=bindparam("batch_id"),
                request_hash=b"",
                start_at=func.greatest(
                    literal(options.schedule_time, TIMESTAMP(timezone=True)), func.now()
                ),
                **batch_values(options, user_id, variable_names, email_column, trace_parent),
            )
            .on_conflict_do_nothing()
            .returning(Batch.id, Batch.start_at, Batch.created_at)
        )
        same_request = select(
            exists().where(Batch.user_id == user_id, Batch.request_id == options.request_id)
        )
        await self._limit(lock_timeout=_LOCK_LIMIT, idle_in_transaction_session_timeout=_IDLE_LIMIT)
        key = request_lock(literal(user_id), literal(options.request_id))
        try:
            await self._connection.execute(select(func.pg_advisory_xact_lock(key)))
            for _ in range(ID_TRIES):
                batch_id = self._ids.issue()
                added = await self._connection.execute(statement, {"batch_id": batch_id})
                row = added.one_or_none()
                # Without a row, either the request or the id is in use.
                if row is not None or (await self._connection.execute(same_request)).scalar_one():
                    break
                _log.info("ids_issued_again", table="batches")
            else:
                raise RuntimeError(f"no batch has an id of its own after {ID_TRIES} tries")
        except DBAPIError as error:
            if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                raise
            raise Unavailable(
                "another call with this request_id is in progress; call again to get its result",
                reason="REQUEST_IN_PROGRESS",
                metadata={"request_id": options.request_id},
            ) from None
        await self._limit(lock_timeout="0")
        return None if row is None else BegunBatch(row.id, row.start_at, row.created_at)

    async def _limit(self, **limits: str) -> None:
        settings = (func.set_config(name, limit, True) for name, limit in limits.items())
        await self._connection.execute(select(*settings))

    async def suppressed(self, user_id: str, recipients: Sequence[str]) -> set[str]:
        """Return which of these addresses the user has suppressed."""
        some = select(exists().where(Suppression.user_id == user_id))
        if not (await self._connection.execute(some)).scalar_one():
            return set()
        erased = await self._has_erased(user_id)
        found: set[str] = set()
        for first in range(0, len(recipients), _COMPARED_AT_ONCE):
            await next_part()
            each = recipients[first : first + _COMPARED_AT_ONCE]
            found |= await suppressed_among(self._connection, user_id, each, erased=erased)
        return found

    async def _has_erased(self, user_id: str) -> bool:
        """Return whether the user had an erased recipient when this was first asked.

        Hashing takes 3 us per row. Later erasures are found by `_drop_suppressed`.
        """
        if self._erased is None:
            self._erased = await has_erased(self._connection, user_id)
        return self._erased

    async def read_quotas(self, user_id: str) -> UserQuotas:
        """Return the present quotas of the user."""
        return await read_quotas(self._connection, user_id, self._default_quotas)

    async def begin_spread(self) -> None:
        """Prepare for jobs that get their times from `spread`."""
        await create_spread_jobs(self._connection)

    async def spread(self, spread: Spread, expire_after: timedelta | None) -> None:
        """Set the times of those jobs, and move them into `email_jobs`."""
        await self._with_ids(
            self._unplaced,
            lambda first: move_spread_jobs(self._connection, spread, expire_after, first),
        )

    async def copy_jobs(
        self,
        count: int,
        lines_from: Callable[[int], Iterable[bytes]],
        *,
        spread: bool = False,
        tagged: bool = False,
    ) -> None:
        """Write `count` jobs. With `spread`, `begin_spread` must come first.

        `lines_from` returns them in parts as `copy_format` does, numbered from its argument; with
        the columns of ids and labels if they are `tagged`, or with `spread`.
        """
        if spread:
            await self._copy(COPY_SPREAD_JOBS, lines_from(self._unplaced))
            self._unplaced += count
        else:
            statement = COPY_TAGGED_JOBS if tagged else COPY_JOBS
            await self._with_ids(count, lambda first: self._copy(statement, lines_from(first)))

    async def _with_ids(self, count: int, write: Callable[[int], Awaitable[None]]) -> None:
        """Run `write` with the first of `count` new ids, and again if one of them is in use."""
        for left in reversed(range(ID_TRIES)):
            try:
                # A savepoint. SQLAlchemy's would cost three times as much.
                async with self._driver.transaction():
                    await write(self._ids.issue(count))
            except (psycopg.errors.UniqueViolation, IntegrityError):
                # No other constraint of `email_jobs` depends on what is stored already.
                if not left:
                    raise
                _log.info("ids_issued_again", table="email_jobs")
            else:
                return

    async def copy_rejections(self, lines: Iterable[bytes]) -> None:
        """Write rejections formatted by `copy_format`, in parts."""
        await self._copy(_COPY_REJECTIONS, lines)

    async def _copy(self, statement: str, lines: Iterable[bytes]) -> None:
        async with self._driver.cursor() as cursor, cursor.copy(statement) as copy:
            for part in lines:
                await copy.write(part)
                await next_part()

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
        """Write the counts and what else is known at the end, such as whether rows have labels.

        Return None if the sender was deleted meanwhile. The locks are taken here and not at the
        beginning, because an upload may take minutes and must not delay a pause or a suppression,
        or another batch.

        Raises:
            ResourceExhausted: USER_WAITING_JOBS_EXCEEDED.
        """
        sender_id = sender.sender_id
        missed = await self._drop_suppressed(begun, sender.user_id)
        counts = replace(
            counts, accepted=counts.accepted - missed, suppressed=counts.suppressed + missed
        )
        dropped = 0
        if counts.accepted or counts.rejected:
            await lock_user(self._connection, sender.user_id)
        if counts.accepted:
            await check_waiting_jobs(self._connection, sender.user_id, counts.accepted, quotas)
        if counts.rejected:
            dropped = await store_rejections(
                self._connection, sender.user_id, begun.batch_id, quotas
            )
        # Locked until the commit, so that DeleteSender finds these jobs.
        locked = (
            select(Sender.id)
            .where(Sender.id == sender_id, Sender.deleted_at.is_(None))
            .with_for_update(read=True)
        )
        if (await self._connection.execute(locked)).one_or_none() is None:
            return None
        await self._connection.execute(
            update(Batch)
            .where(Batch.id == begun.batch_id)
            .values(
                request_hash=request_hash,
                last_due_at=last_due,
                spacing_ms=round(spacing / _MILLISECOND),
                accepted_count=counts.accepted,
                rejected_count=counts.rejected,
                duplicate_count=counts.duplicate,
                suppressed_count=counts.suppressed,
                row_labels=row_labels,
            )
        )
        if counts.accepted:
            await count_accepted(self._connection, sender_id, begun.batch_id, counts.accepted)
            await mark_stale(self._connection, [sender_id])
        return FinishedBatch(counts, dropped)

    async def record(self, change: RecordedChange) -> None:
        """Append an event to the audit log."""
        # If the audit log stays locked, the call gives its place to another one.
        await self._limit(lock_timeout=_LOCK_LIMIT)
        await record_change(self._connection, change)

    async def _drop_suppressed(self, begun: BegunBatch, user_id: str) -> int:
        """Delete jobs whose addresses were suppressed after `suppressed` ran. Return how many."""
        await lock_suppressions(self._connection, user_id, shared=True)
        new = (Suppression.user_id == user_id, Suppression.created_at > begun.accepted_at - _SLACK)
        if not (await self._connection.execute(select(exists().where(*new)))).scalar_one():
            return 0
        exact = select(Suppression.address).where(*new, Suppression.form == SuppressionForm.EXACT)
        folded = select(Suppression.address).where(*new, Suppression.form.is_(None))
        dropped = await self._connection.execute(
            delete(EmailJob).where(
                EmailJob.batch_id == begun.batch_id,
                or_(
                    exact_job_key().in_(exact),
                    folded_job_key().in_(folded),
                    erased_key(user_id, exact_job_key()).in_(exact),
                    erased_key(user_id, folded_job_key()).in_(folded),
                ),
            )
        )
        return dropped.rowcount
