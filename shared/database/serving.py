"""Checks that PostgreSQL serves this release, by one statement that needs what all others need.

It names every column that this release uses, and changes no row of the tables that each mail and
each batch change. So it fails on a read-only server, without a table, column or privilege. It costs
no more than its plan, which is 2 ms of PostgreSQL: `check_writable` is for checks in between.

A lock on a table that each mail needs delays the check, as it delays mail. One on another table, as
by VACUUM FULL, does not: mail flows meanwhile.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Select, delete, exists, false, func, insert, literal, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.database.engine import is_locked
from outbox_server.shared.database.models import (
    Attempt,
    AuditEvent,
    Base,
    Batch,
    ChangeRequest,
    CountDelta,
    EmailJob,
    HeadMarker,
    Heartbeat,
    JobEvent,
    ShardLife,
)

# The tables without which no mail is sent: dispatchers use them to load heads and to mark mails,
# and a trigger writes an event for each outcome.
OF_EACH_MAIL: Final = frozenset(
    (
        *("agreed_settings", "attempts", "batch_cancellations", "batches", "cooldowns"),
        *("count_deltas", "email_jobs", "erasure_key", "head_markers", "heartbeat", "held_sends"),
        *("hold", "hold_releases", "job_change_blocks", "job_changes", "job_events"),
        *("oauth2_credentials", "senders", "shard_lives", "suppressions", "users"),
    )
)
# How long the check of the other tables waits for a lock.
_LOCK_LIMIT: Final = "100ms"


def _insert(model: type[Base]) -> Any:
    columns = [each for each in model.__table__.columns if each.identity is None]
    names = [each.name for each in columns]
    none = select(*columns).where(false())
    return insert(model).from_select(names, none, include_defaults=False)


def _columns(*, of_each_mail: bool) -> Select[Any]:
    tables = [
        each for each in Base.metadata.sorted_tables if (each.name in OF_EACH_MAIL) is of_each_mail
    ]
    columns: list[Any] = [exists(select(*table.columns).where(false())) for table in tables]
    return select(*columns)


def _of_each_mail() -> Select[Any]:
    changes = (
        *map(_insert, (Attempt, CountDelta, HeadMarker, Heartbeat, JobEvent, ShardLife)),
        update(EmailJob).where(false()).values(state=EmailJob.state),
        update(ShardLife).where(false()).values(life=ShardLife.life),
        update(Heartbeat).where(false()).values(beat_at=Heartbeat.beat_at),
        delete(HeadMarker).where(false()),
    )
    ctes = [each.returning(literal(1)).cte(f"change_{n}") for n, each in enumerate(changes)]
    return _columns(of_each_mail=True).add_cte(*ctes)


def _others() -> Select[Any]:
    # What a scheduler inserts for a batch.
    changes = map(_insert, (AuditEvent, Batch, ChangeRequest, EmailJob))
    ctes = [each.returning(literal(1)).cte(f"change_{n}") for n, each in enumerate(changes)]
    return _columns(of_each_mail=False).add_cte(*ctes)


_STATEMENT: Final = _of_each_mail()
_OTHERS: Final = _others()
_WRITE: Final = update(Heartbeat).where(false()).values(beat_at=Heartbeat.beat_at)
_WAIT_BRIEFLY: Final = select(func.set_config("lock_timeout", _LOCK_LIMIT, literal(True)))


async def check_serving(engine: AsyncEngine) -> None:
    """Check that PostgreSQL has what this release uses, and can write.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: it does not, or cannot be reached.
    """
    async with engine.connect() as opened:
        # The limit for locks ends with the transaction.
        connection = await opened.execution_options(isolation_level="READ COMMITTED")
        await connection.execute(_STATEMENT)
        await connection.execute(_WAIT_BRIEFLY)
        try:
            await connection.execute(_OTHERS)
        except DBAPIError as error:
            if not is_locked(error):
                raise


async def check_writable(engine: AsyncEngine) -> None:
    """Check that PostgreSQL can write, by one table that every service uses.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: it cannot, or cannot be reached.
    """
    async with engine.connect() as connection:
        await connection.execute(_WRITE)
