"""Stores several small batches in one transaction, with few statements for all of them.

It waits for no lock of others. What another transaction has locked (the user, the `request_id`, the
sender) is left to the caller, so that one call cannot delay the others of its group.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, cast

import psycopg
from sqlalchemy import (
    BigInteger,
    Boolean,
    Integer,
    Text,
    and_,
    any_,
    bindparam,
    func,
    insert,
    literal,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.storage.batches import BatchRecord, read_new
from outbox_server.services.scheduler.storage.intake import (
    COPY_JOBS,
    COPY_TAGGED_JOBS,
    IntakeSender,
    KnownRequest,
    request_lock,
)
from outbox_server.services.scheduler.storage.suppressions import suppression_lock
from outbox_server.shared.database.count_deltas import counting_accepted
from outbox_server.shared.database.counts import open_counts
from outbox_server.shared.database.erased_keys import erased_key
from outbox_server.shared.database.models import Batch, Sender, Suppression, UserRow
from outbox_server.shared.heads.markers import marking_stale
from outbox_server.shared.id_source import IdSource
from outbox_server.shared.quotas.storage import QUOTA_COLUMNS, quotas_of, user_lock
from outbox_server.shared.user_quotas import UserQuotas

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


@dataclass(frozen=True, slots=True)
class GroupedBatch:
    """A batch to write: the row's values, and its jobs as `copy_format` returns them."""

    values: Mapping[str, Any]
    accepted: int
    lines: bytes
    # Whether they have the columns of ids and labels.
    tagged: bool = False


def _calls(*names: str) -> Any:
    types = {"number": Integer, "sender_id": BigInteger}
    arrays = (bindparam(f"{name}_list", type_=ARRAY(types.get(name, Text))) for name in names)
    return func.unnest(*arrays).table_valued(*names).render_derived()


def _lock_statement() -> Any:
    """Return the statement that locks, without waiting, and reads what the locks protect last."""
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


def _count_statement() -> Any:
    """Count the jobs of new batches, and request loads of the heads of their senders."""
    types = {"n": Integer}
    names = ("sender_id", "batch_id", "n")
    arrays = (bindparam(f"{each}_list", type_=ARRAY(types.get(each, BigInteger))) for each in names)
    rows = func.unnest(*arrays).table_valued(*names).render_derived()
    batches = select(*rows.c).cte("new_batches")
    return select(literal(1)).add_cte(counting_accepted(batches)).add_cte(marking_stale(batches))


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


# Built once, because that takes longer than to run them.
_LOCK: Final = _lock_statement()
_KNOWN: Final = _known_statement()
_SUPPRESSED: Final = _suppressed_statement()
_COUNT: Final = _count_statement()


class GroupIntakeStore:
    """Opens the transactions of groups."""

    def __init__(
        self, engine: AsyncEngine, quotas: UserQuotas, ids: IdSource | None = None
    ) -> None:
        """`quotas` are the defaults, for users without overrides."""
        self._engine = engine
        self._quotas = quotas
        self.ids = ids or IdSource()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[AsyncConnection]:
        """Hold a connection for several groups, which saves the time to test it for each."""
        async with self._engine.connect() as connection:
            yield connection

    @asynccontextmanager
    async def begin(self, connection: AsyncConnection) -> AsyncIterator[GroupTransaction]:
        """Open a transaction. It is committed at the end of the block, or rolled back."""
        async with connection.begin():
            raw = await connection.get_raw_connection()
            driver = cast(psycopg.AsyncConnection[Any], raw.driver_connection)
            try:
                yield GroupTransaction(connection, driver, self._quotas)
            except psycopg.OperationalError:
                # COPY bypasses SQLAlchemy, so the pool does not notice a closed connection.
                if driver.closed:
                    await connection.invalidate()
                raise


class GroupTransaction:
    """The open transaction of a group. First `lock`, then read, then `write`.

    Each statement sees what was committed before it, so those after `lock` see everything that the
    locks protect.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        driver: psycopg.AsyncConnection[Any],
        default_quotas: UserQuotas,
    ) -> None:
        self._connection = connection
        self._driver = driver
        self._default_quotas = default_quotas

    async def lock(self, calls: Sequence[GroupCall]) -> dict[int, LockedSender]:
        """Return the sender of each call, by the number of the call.

        Those are missing whose sender does not exist, is deleted, belongs to another user, or is
        locked by somebody else.
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
            for row in await self._connection.execute(_LOCK, values)
        }

    async def known_requests(
        self, requests: Collection[tuple[str, str]]
    ) -> tuple[dict[tuple[str, str], KnownRequest], set[str]]:
        """Return the batches of these (user, request_id), and the users with suppressions."""
        values = _columns(requests, "user_id", "request_id")
        rows = (await self._connection.execute(_KNOWN, values)).all()
        known = {
            (row.user_id, row.request_id): KnownRequest(row.id, row.request_hash)
            for row in rows
            if row.id is not None
        }
        return known, {row.user_id for row in rows if row.suppresses}

    async def suppressed(
        self, keys: Collection[tuple[str, str]]
    ) -> set[tuple[str, str, int | None]]:
        """Return the (user, key, form) that are suppressed, of these (user, key)."""
        rows = await self._connection.execute(_SUPPRESSED, _columns(keys, "user_id", "address"))
        return {(row.user_id, row.address, row.form) for row in rows}

    async def open_counts(self, user_ids: Collection[str]) -> dict[str, int]:
        """Return the number of open jobs of each user."""
        return await open_counts(self._connection, user_ids)

    async def write(self, batches: Sequence[GroupedBatch]) -> dict[int, BatchRecord]:
        """Write batches and their jobs. Return the batches as they are stored.

        Raises:
            sqlalchemy.exc.IntegrityError, psycopg.errors.UniqueViolation: an id is in use, or
                another process has written a batch with such a `request_id`.
        """
        await self._connection.execute(insert(Batch), [dict(batch.values) for batch in batches])
        for tagged, statement in ((False, COPY_JOBS), (True, COPY_TAGGED_JOBS)):
            lines = b"".join(batch.lines for batch in batches if batch.tagged == tagged)
            if lines:
                async with self._driver.cursor() as cursor, cursor.copy(statement) as copy:
                    await copy.write(lines)
        accepted = {batch.values["id"]: batch.accepted for batch in batches}
        filled = [batch for batch in batches if batch.accepted]
        if filled:
            values = {
                "sender_id_list": [batch.values["sender_id"] for batch in filled],
                "batch_id_list": [batch.values["id"] for batch in filled],
                "n_list": [batch.accepted for batch in filled],
            }
            await self._connection.execute(_COUNT, values)
        return await read_new(self._connection, accepted)


def _columns(pairs: Iterable[tuple[str, str]], *names: str) -> dict[str, list[str]]:
    """Return the values of `_calls` with these two names."""
    columns = zip(*pairs, strict=True)
    return {f"{name}_list": list(column) for name, column in zip(names, columns, strict=True)}
