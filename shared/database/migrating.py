"""Brings the schema up to date while the services run.

Each migration is a transaction of its own. The wait for each lock is short, because all statements
that need the same table queue behind it; a migration that does not get its locks is tried again. A
migration that was interrupted is run again by the next call.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, pool, text
from sqlalchemy.exc import DBAPIError

from outbox_server.shared.database.connecting import connect_directly
from outbox_server.shared.database.schema import SchemaRevision
from outbox_server.shared.errors import OutboxError

# All writers of a table wait while a migration waits for its lock, so together with the statement
# itself this must stay below one second.
LOCK_TIMEOUT_MS: Final = 500
# How long the tries wait for a lock, one after the other, from the start again after the last. A
# migration that has locked one table and waits for another may block the transaction that it waits
# for. A longer wait does not help then, but another try does: most tries are short. The long ones
# are for transactions that hold their locks for longer.
_WAITS_MS: Final = (*(20,) * 8, *(50,) * 4, *(100,) * 2, 200, LOCK_TIMEOUT_MS)
# The pause after a try, in which the others go on, is this many times as long as its wait.
_PAUSES: Final = 2
# Locked tables are reported at most this often.
_REPORT_S: Final = 1.0
PATIENCE: Final = timedelta(minutes=10)
_POLL_S: Final = 0.2
# Any constant. The session that holds this advisory lock migrates.
_ADVISORY_LOCK: Final = 7_402_311_915
_SETTINGS: Final = {
    "lock_timeout": str(LOCK_TIMEOUT_MS),
    "statement_timeout": "0",
    "timezone": "UTC",
    # When this process dies, its session ends its statement and releases its locks.
    "client_connection_check_interval": "1000",
}
_RETRIED: Final = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)
_OLDEST_TRANSACTION: Final = text(
    "SELECT pid, coalesce(nullif(application_name, ''), backend_type) AS who,"
    " extract(epoch FROM clock_timestamp() - xact_start)::int AS seconds"
    " FROM pg_stat_activity"
    " WHERE xact_start IS NOT NULL AND datname = current_database() AND pid <> pg_backend_pid()"
    " ORDER BY xact_start LIMIT 1"
)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Migrated:
    """The revisions of the schema before and after; `before` is empty for a new database."""

    before: str
    after: str


class MigrationBlockedError(OutboxError):
    """A migration did not get its locks in time; what was done so far is kept."""

    default_reason = "MIGRATION_BLOCKED"


def _silent(_: str) -> None:
    """Report nothing."""


def migrate(
    url: str,
    *,
    say: Say = _silent,
    patience: timedelta = PATIENCE,
    revision: str = "head",
    more_versions: Path | None = None,
) -> Migrated:
    """Bring the schema to `revision`, and return what changed; safe to run from many processes.

    `say` gets a line about each step and each wait. `more_versions` is a folder of migrations that
    run after the migrations of this release; tests use it.

    Raises:
        ConfigurationError: the schema is newer, and no longer has what this release uses; or the
            URL is malformed, or leads to a pooler, which keeps no lock of a session.
        MigrationBlockedError: the locks were not free for `patience`; run it again later.
        sqlalchemy.exc.SQLAlchemyError: PostgreSQL cannot be reached, or a migration is wrong.
    """
    end = time.monotonic() + patience.total_seconds()
    with _session(url) as connection:
        _lock(connection, end, patience, say)
        _prepare_version_table(connection)
        config = _config(connection, url, say, patience, more_versions)
        head = ScriptDirectory.from_config(config).get_current_head()
        present = _revision(connection)
        if head is not None and present.revision > head:
            # This is so after a roll-back, whose first step runs the migrations of the older
            # release.
            present.check(head)
            say(f"the schema is at revision {present.revision}, newer than this release: it stays")
            return Migrated(present.revision, present.revision)
        waits, report_at = itertools.cycle(_WAITS_MS), -math.inf
        while True:
            wait_ms = next(waits)
            connection.execute(text(f"SET lock_timeout = {wait_ms}"))
            connection.commit()
            try:
                command.upgrade(config, revision)
            except DBAPIError as error:
                if not isinstance(error.orig, _RETRIED):
                    raise
                connection.rollback()
                cause = f"a table is locked{_holder(connection)}"
                now = time.monotonic()
                if now >= end:
                    raise MigrationBlockedError(
                        f"{cause}, and was for {patience.total_seconds():g} s: end that "
                        "transaction, or migrate later; finished migrations are kept"
                    ) from None
                if now >= report_at:
                    say(f"{cause}; trying again")
                    report_at = now + _REPORT_S
                time.sleep(_PAUSES * wait_ms / 1000)
            else:
                return Migrated(present.revision, _revision(connection).revision)


@contextmanager
def _session(url: str) -> Iterator[Connection]:
    engine = create_engine(
        "postgresql+psycopg://",
        poolclass=pool.NullPool,
        creator=partial(connect_directly, url, _SETTINGS, application_name="outbox migrate"),
    )
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _lock(connection: Connection, end: float, patience: timedelta, say: Say) -> None:
    """Take the lock of migrators.

    It polls: a session that waits inside PostgreSQL has a snapshot, and CREATE INDEX CONCURRENTLY
    of the other migrator would wait for that session, so that both would wait for ever.
    """
    waited = False
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": _ADVISORY_LOCK}):
        connection.rollback()
        if time.monotonic() >= end:
            raise MigrationBlockedError(
                f"another process migrates this database, and did for "
                f"{patience.total_seconds():g} s: wait for its end, or end it"
            )
        if not waited:
            say("another process migrates this database; waiting for it")
        waited = True
        time.sleep(_POLL_S)
    connection.commit()


def _prepare_version_table(connection: Connection) -> None:
    """Create Alembic's table with our column, which says which releases can run on the schema."""
    has_column = connection.scalar(
        text(
            "SELECT count(*) FROM pg_attribute WHERE attname = 'oldest_revision'"
            " AND attrelid = to_regclass('alembic_version')"
        )
    )
    if not has_column:
        connection.execute(
            text(
                "CREATE TABLE IF NOT EXISTS alembic_version (version_num varchar(32) NOT NULL"
                " CONSTRAINT alembic_version_pkc PRIMARY KEY)"
            )
        )
        connection.execute(text("ALTER TABLE alembic_version ADD COLUMN oldest_revision text"))
    connection.commit()


def _revision(connection: Connection) -> SchemaRevision:
    row = connection.execute(
        text("SELECT version_num, oldest_revision FROM alembic_version")
    ).first()
    connection.rollback()
    return SchemaRevision("") if row is None else SchemaRevision(row[0], row[1])


def _config(
    connection: Connection, url: str, say: Say, patience: timedelta, more_versions: Path | None
) -> Config:
    folder = files("outbox_server.shared.database").joinpath("migrations")
    config = Config()
    config.set_main_option("script_location", str(folder))
    if more_versions is not None:
        config.set_main_option("path_separator", "newline")
        config.set_main_option("version_locations", f"{folder}/versions\n{more_versions}")
    config.attributes["connection"] = connection
    config.attributes["options"] = {
        "transaction_per_migration": True,
        "on_version_apply": (partial(_finish, say),),
        # `online_steps` uses it.
        "say": say,
        "database_url": url,
        "patience": patience,
    }
    return config


def _finish(say: Say, *, ctx: MigrationContext, step: MigrationInfo, **_: Any) -> None:
    """Record, in the transaction of a contract step, which code still runs after it."""
    script = step.up_revision
    oldest = getattr(getattr(script, "module", None), "oldest_revision", None)
    if oldest is not None and ctx.connection is not None:
        ctx.connection.execute(
            text("UPDATE alembic_version SET oldest_revision = :oldest"), {"oldest": oldest}
        )
    say(f"{step.up_revision_id}: {getattr(script, 'doc', '')}")


def _holder(connection: Connection) -> str:
    """Return who holds the oldest transaction, for messages; empty if nobody holds one any more."""
    row = connection.execute(_OLDEST_TRANSACTION).first()
    connection.rollback()
    if row is None:
        return ""
    return f" (the oldest transaction is of {row.who}, pid {row.pid}, since {row.seconds} s)"
