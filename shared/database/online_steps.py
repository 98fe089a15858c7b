"""Steps of migrations that must not block the services, however large a table is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, Final

import psycopg
from alembic import op
from sqlalchemy import exists, select, text
from sqlalchemy import table as column_table

from outbox_server.shared.database.connecting import connect_directly
from outbox_server.shared.database.migrating import LOCK_TIMEOUT_MS, Say

_REPORT_S: Final = 2.0
_VALID: Final = text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)")
_PROGRESS: Final = """
    SELECT phase, coalesce(nullif(blocks_done, 0), tuples_done),
           coalesce(nullif(blocks_total, 0), tuples_total), current_locker_pid
    FROM pg_stat_progress_create_index WHERE pid = %s
"""


def lock_tables(*names: str) -> None:
    """Lock all existing tables that a migration changes. It is the first step of the migration.

    The tables that others refer to come last. A statement that inserts rows locks its own table
    first, and then those that it reads. So in this order, no statement holds a table that the
    migration needs while it waits for one that the migration has.
    """
    op.execute(f"LOCK TABLE {', '.join(names)} IN ACCESS EXCLUSIVE MODE")


def create_index_concurrently(
    name: str, table: str, columns: Sequence[Any], **options: Any
) -> None:
    """Build an index while the table is read and written. It must be a migration of its own.

    It runs outside of a transaction. An index that an interrupted run left behind is invalid: it
    is dropped and built again. `options` are passed to `op.create_index`.
    """
    with _outside_of_a_transaction():
        valid = op.get_bind().scalar(_VALID, {"name": name})
        if valid:
            return
        if valid is not None:
            op.drop_index(name, table, postgresql_concurrently=True)
        op.create_index(name, table, columns, postgresql_concurrently=True, **options)


def drop_index_if_unused(name: str, table: str) -> None:
    """Drop an index that this release does not use, if the table is empty.

    It must be a migration of its own. If the table has rows, processes of an earlier release may
    run, now or after a rollback, and would read the whole table instead. A later release drops the
    index there.
    """
    with _outside_of_a_transaction():
        if not op.get_bind().scalar(select(exists().select_from(column_table(table)))):
            op.drop_index(name, table, postgresql_concurrently=True, if_exists=True)


@contextmanager
def _outside_of_a_transaction() -> Iterator[None]:
    context = op.get_context()
    options = context.opts
    patience_ms = int(options["patience"].total_seconds() * 1000)
    with context.autocommit_block():
        # The build waits for transactions that began before it. Nobody waits for the build, so it
        # may wait for long.
        op.execute(f"SET lock_timeout = {patience_ms}")
        pid = op.get_bind().scalar(text("SELECT pg_backend_pid()"))
        try:
            with _progress(options["database_url"], int(pid or 0), options["say"]):
                yield
        finally:
            op.execute(f"SET lock_timeout = {LOCK_TIMEOUT_MS}")


@contextmanager
def _progress(url: str, pid: int, say: Say) -> Iterator[None]:
    """Report the progress of the index build of session `pid` every few seconds."""
    over = Event()

    def report() -> None:
        try:
            with connect_directly(url, autocommit=True) as connection:
                while not over.wait(_REPORT_S):
                    row = connection.execute(_PROGRESS, [pid]).fetchone()
                    if row is not None:
                        phase, done, total, locker = row
                        share = f", {100 * done // total} %" if total else ""
                        waits = f", for the transaction of pid {locker}" if locker else ""
                        say(f"index: {phase}{share}{waits}")
        except psycopg.OperationalError as error:
            say(f"the progress cannot be read: {error}")

    thread = Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
