"""Stores several small batches in one transaction, with few statements for all of them.

It waits for no lock of others. What another transaction has locked (the user, the `request_id`, the
sender) is left to the caller, so that one call cannot delay the others of its group.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeAlias

import psycopg
from sqlalchemy import (
    BigInteger,
    Boolean,
    Integer,
    Text,
    and_,
    any_,
    bindparam,
    cast,
    column,
    func,
    insert,
    literal,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSON
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.scheduler.storage.new_batches import (
    IntakeSender,
    KnownRequest,
    request_lock,
)
from outbox_server.services.scheduler.storage.suppressions import suppression_lock
from outbox_server.shared.database.audit_events import RecordedChange, change_values
from outbox_server.shared.database.count_deltas import counting_accepted
from outbox_server.shared.database.counts import MOST_OPEN_COUNTS
from outbox_server.shared.database.erased_keys import erased_key
from outbox_server.shared.database.frequent import (
    FrequentStatement,
    KeptConnections,
    named_rows,
    transaction_on,
)
from outbox_server.shared.database.models import (
    AuditEvent,
    Batch,
    EmailJob,
    Sender,
    Suppression,
    UserRow,
)
from outbox_server.shared.heads.markers import marking_stale
from outbox_server.shared.id_source import IdSource
from outbox_server.shared.quotas.storage import QUOTA_COLUMNS, quotas_of, user_lock
from outbox_server.shared.user_quotas import QUOTAS, UserQuotas

Driver: TypeAlias = psycopg.AsyncConnection[Any]

# Older releases lock no request, so an insert may still wait for one of them.
_LOCK_LIMIT: Final = "1s"


@dataclass(frozen=True, slots=True)
class GroupCall:
    """A call of a group. `user_id` is the user that it acts for; None means any."""

    sender_id: int
    request_id: str
    user_id: str | None


@dataclass(frozen=True, slots=True)
class LockedSender:
    """The sender of a call, and whether everything that the call needs is locked."""

    sender: IntakeSender
    quotas: UserQuotas
    locked: bool
    # The present time of the transaction.
    now: datetime


@dataclass(slots=True)
class OpenJobs:
    """The number of open jobs of a user; if it is not `exact`, there may be fewer."""

    count: int
    exact: bool = True


@dataclass(frozen=True, slots=True)
class GroupedBatch:
    """A batch to write: the values of its row and of those of its jobs, and its event."""

    values: Mapping[str, Any]
    jobs: Sequence[Mapping[str, Any]]
    # The event of the audit log.
    change: RecordedChange


def _calls(*names: str) -> Any:
    types = {"number": Integer, "sender_id": BigInteger}
    arrays = (bindparam(f"{name}_list", type_=ARRAY(types.get(name, Text))) for name in names)
    return func.unnest(*arrays).table_valued(*names).render_derived()


def _lock_statement() -> Any:
    """Return the statement that takes locks without waiting, then reads what they protect."""
    calls = _calls("number", "sender_id", "request_id", "user_id")
    user = Sender.user_id
    locks = and_(
        func.pg_try_advisory_xact_lock(request_lock(user, calls.c.request_id), type_=Boolean),
        func.pg_try_advisory_xact_lock(*user_lock(user), type_=Boolean),
        func.pg_try_advisory_xact_lock_shared(*suppression_lock(user), type_=Boolean),
        # In every transaction, because a pooler may give each of them another session.
        func.set_config("lock_timeout", _LOCK_LIMIT, literal(True)) != literal(""),
    )
    return (
        select(
            calls.c.number,
            Sender.id,
            Sender.user_id,
            Sender.email,
            UserRow.sender_domains,
            *QUOTA_COLUMNS,
            locks.label("locked"),
            func.now().label("now"),
        )
        .select_from(calls)
        .join(Sender, Sender.id == calls.c.sender_id)
        .outerjoin(UserRow, UserRow.user_id == Sender.user_id)
        .where(
            or_(calls.c.user_id.is_(None), calls.c.user_id == Sender.user_id),
            Sender.deleted_at.is_(None),
        )
        # Locked until the commit, so that DeleteSender finds these jobs.
        .with_for_update(read=True, of=Sender, skip_locked=True)
    )


def _known_statement() -> Any:
    """Return the batches that exist of requests, and whether the users have suppressions."""
    calls = _calls("user_id", "request_id")
    some = select(Suppression.address).where(Suppression.user_id == calls.c.user_id)
    return (
        select(
            calls.c.user_id,
            calls.c.request_id,
            Batch.id,
            Batch.request_hash,
            some.correlate(calls).exists().label("suppresses"),
        )
        .select_from(calls)
        .outerjoin(
            Batch, and_(Batch.user_id == calls.c.user_id, Batch.request_id == calls.c.request_id)
        )
    )


def _records(name: str, table: Any, columns: Sequence[str]) -> Any:
    """Return the rows of a parameter, a JSON array of objects with these columns of a table."""
    types = (column(each, table.__table__.c[each].type) for each in columns)
    rows = func.json_to_recordset(cast(bindparam(name), JSON))
    return rows.table_valued(*types, name=name).render_derived(name=name, with_types=True)


def _write_statement() -> Any:
    """Return the statement that writes batches and their jobs, and the events of the audit log.

    It also counts the jobs, and requests loads of the heads of their senders by markers, which it
    returns.
    """
    batches = _records("batches", Batch, BATCH_COLUMNS)
    jobs = _records("jobs", EmailJob, JOB_COLUMNS)
    events = _records("events", AuditEvent, EVENT_COLUMNS)
    new = (
        insert(Batch)
        .from_select(BATCH_COLUMNS, select(*batches.c))
        .returning(Batch.id, Batch.sender_id, Batch.accepted_count)
        .cte("new_batches")
    )
    filled = (
        select(new.c.sender_id, new.c.id.label("batch_id"), new.c.accepted_count.label("n"))
        .where(new.c.accepted_count > 0)
        .cte("filled")
    )
    marked = marking_stale(filled)
    return (
        select(marked.c.sender_id, marked.c.id)
        .add_cte(insert(EmailJob).from_select(JOB_COLUMNS, select(*jobs.c)).cte("new_jobs"))
        .add_cte(insert(AuditEvent).from_select(EVENT_COLUMNS, select(*events.c)).cte("new_events"))
        .add_cte(counting_accepted(filled))
    )


def _suppressed_statement() -> Any:
    keys = _calls("user_id", "address")
    return (
        select(keys.c.user_id, keys.c.address, Suppression.form)
        .select_from(keys)
        .join(
            Suppression,
            and_(
                Suppression.user_id == keys.c.user_id,
                Suppression.address
                == any_(
                    func.array_append(
                        func.array_append(literal([], ARRAY(Text)), keys.c.address),
                        erased_key(keys.c.user_id, keys.c.address),
                    )
                ),
            ),
        )
    )


# What a new batch and a new job have; the other columns have their defaults.
BATCH_COLUMNS: Final = (
    *("id", "user_id", "sender_id", "request_id", "request_hash", "subject", "body", "html"),
    *("variable_names", "email_column", "start_at", "last_due_at", "spacing_ms"),
    *("expire_after_ms", "duplicates", "mode", "accepted_count", "duplicate_count"),
    *("suppressed_count", "trace_parent", "reply_to", "headers", "name_column", "external_id"),
    *("labels", "row_labels", "test"),
)
JOB_COLUMNS: Final = (
    *("id", "batch_id", "sender_id", "scheduled_at", "expires_at", "row_number", "recipient"),
    *("recipient_key", "address_key", "variables", "external_id", "external_key", "labels"),
)
EVENT_COLUMNS: Final = ("actor", "identity", "reason", "action", "target", "user_id", "after")
# Built once, because building them takes longer than running them.
_LOCK: Final = FrequentStatement(_lock_statement())
_KNOWN: Final = FrequentStatement(_known_statement())
_OPEN: Final = FrequentStatement(MOST_OPEN_COUNTS)
_SUPPRESSED: Final = FrequentStatement(_suppressed_statement())
_WRITE: Final = FrequentStatement(_write_statement())
_LOCKED: Final = named_rows(
    ("number", "id", "user_id", "email", "sender_domains", *QUOTAS, "locked", "now")
)


class GroupIntakeStore:
    """Opens the transactions of groups."""

    def __init__(
        self, engine: AsyncEngine, quotas: UserQuotas, ids: IdSource | None = None
    ) -> None:
        """`engine` runs single statements. `quotas` are those of users without overrides."""
        # Two groups may be written at the same time.
        self._kept = KeptConnections(engine, kept=2)
        self._quotas = quotas
        self.ids = ids or IdSource()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Driver]:
        """Hold a connection for several groups."""
        async with self._kept.connection() as driver:
            yield driver

    @asynccontextmanager
    async def begin(self, driver: Driver) -> AsyncIterator[GroupTransaction]:
        """Open a transaction. It is committed at the end of the block, or rolled back."""
        async with transaction_on(driver):
            yield GroupTransaction(driver, self._quotas)

    async def close(self) -> None:
        """Return the connection to the engine."""
        await self._kept.aclose()


class GroupTransaction:
    """The open transaction of a group. First `lock`, then read, then `write`.

    Each statement sees what was committed before it, so those after `lock` see everything that the
    locks protect.
    """

    def __init__(self, driver: Driver, default_quotas: UserQuotas) -> None:
        self._driver = driver
        self._default_quotas = default_quotas

    async def lock(self, calls: Sequence[GroupCall]) -> dict[int, LockedSender]:
        """Return the sender of each call, by the number of the call.

        A call is missing if its sender does not exist, is deleted, belongs to another user, or is
        locked by another transaction.
        """
        values = {
            "number_list": list(range(len(calls))),
            "sender_id_list": [call.sender_id for call in calls],
            "request_id_list": [call.request_id for call in calls],
            "user_id_list": [call.user_id for call in calls],
        }
        return {
            row.number: LockedSender(
                IntakeSender(row.id, row.user_id, False, row.email, row.sender_domains or ()),
                quotas_of(row, self._default_quotas),
                row.locked,
                row.now,
            )
            for row in map(_LOCKED, await _LOCK.run(self._driver, values))
        }

    async def known_requests(
        self, requests: Collection[tuple[str, str]]
    ) -> tuple[dict[tuple[str, str], KnownRequest], set[str]]:
        """Return the batches of these (user, request_id), and the users with suppressions."""
        values = _columns(requests, "user_id", "request_id")
        rows = await _KNOWN.run(self._driver, values)
        known = {
            (user, request): KnownRequest(batch_id, digest)
            for user, request, batch_id, digest, _ in rows
            if batch_id is not None
        }
        return known, {user for user, _, _, _, suppresses in rows if suppresses}

    async def suppressed(
        self, keys: Collection[tuple[str, str]]
    ) -> set[tuple[str, str, int | None]]:
        """Return the (user, key, form) that are suppressed, of these (user, key)."""
        rows = await _SUPPRESSED.run(self._driver, _columns(keys, "user_id", "address"))
        return {(user, address, form) for user, address, form in rows}

    async def open_counts(self, user_ids: Collection[str]) -> dict[str, OpenJobs]:
        """Return the number of open jobs of each user."""
        found = {user: OpenJobs(0) for user in user_ids}
        for user, count, cancelling in await _OPEN.run(self._driver, {"user_ids": list(found)}):
            found[user] = OpenJobs(count, exact=not cancelling)
        return found

    async def write(self, batches: Sequence[GroupedBatch]) -> dict[int, int]:
        """Write batches and their jobs. Return the new marker of each sender with jobs.

        Raises:
            psycopg.errors.UniqueViolation: an id is in use, or another process has written a batch
                with such a `request_id`.
        """
        values = {
            "batches": _as_json([batch.values for batch in batches]),
            "jobs": _as_json([job for batch in batches for job in batch.jobs]),
            "events": _as_json([change_values(batch.change) for batch in batches]),
        }
        return dict(await _WRITE.run(self._driver, values))


def _as_json(rows: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(rows, ensure_ascii=False, default=_as_text, separators=(",", ":"))


def _as_text(value: datetime | bytes) -> str:
    """Return a value as PostgreSQL reads it, which JSON does not have."""
    return f"\\x{value.hex()}" if isinstance(value, bytes) else value.isoformat()


def _columns(pairs: Iterable[tuple[str, str]], *names: str) -> dict[str, list[str]]:
    """Return the values of `_calls` with these two names."""
    columns = zip(*pairs, strict=True)
    return {f"{name}_list": list(column) for name, column in zip(names, columns, strict=True)}
