"""All SQL of a drill. Triggers make writes fail as on a full disk or in a conflict."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final, LiteralString, TypeAlias

import psycopg
from psycopg import errors, sql

from outbox_server.shared.auth.keys import ApiKeyKind, NewKey
from outbox_server.shared.auth.store import insert_key
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.queue.user_limits import UserSendLimits
from outbox_server.shared.settings import load_settings
from outbox_server.shared.states import FINAL_STATES

_Statement: TypeAlias = sql.SQL | sql.Composed
_Connection: TypeAlias = psycopg.AsyncConnection[tuple[Any, ...]]

# A session that waits for a table lock makes all others queue behind it, so limit that wait.
_SETTINGS: Final = "-c lock_timeout=200ms"
_TABLES: Final = (
    "SELECT tablename FROM pg_tables WHERE schemaname = current_schema() ORDER BY tablename"
)
_FAIL: Final = """
    CREATE OR REPLACE FUNCTION drill_fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF random() < {share} THEN
            RAISE EXCEPTION 'a fault of the drill' USING ERRCODE = {state};
        END IF;
        RETURN NULL;
    END $$
"""
_ON: Final = """
    CREATE OR REPLACE TRIGGER drill_fault BEFORE INSERT OR UPDATE OR DELETE ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION drill_fault()
"""
_OFF: Final = "DROP TRIGGER IF EXISTS drill_fault ON {table}"
_GONE: Final = "DROP FUNCTION IF EXISTS drill_fault()"
_COUNT_OPEN: Final = "SELECT count(*) FROM email_jobs WHERE state <> ALL(%s)"
_LIMIT_USER: Final = "INSERT INTO users (user_id, hourly_limit, min_gap_ms) VALUES (%s, %s, %s)"
_MARKERS_OF: Final = (
    "SELECT m.id FROM head_markers m JOIN senders s ON s.id = m.sender_id WHERE s.user_id = %s"
)
_ANY_OF: Final = "SELECT 1 FROM head_markers WHERE id = ANY(%s) LIMIT 1"
_END_OF_DATABASE: Final = (
    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s"
)
_END_OTHERS: Final = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
)


async def fail_writes(url: str, state: str, share: float) -> bool:
    """Make this share of all writing statements fail with an SQLSTATE; False: call it again."""
    fail = sql.SQL(_FAIL).format(share=sql.Literal(share), state=sql.Literal(state))
    return await _everywhere(url, [fail], _ON, [])


async def heal_writes(url: str) -> bool:
    """Make writes work again; False if some tables are not done: call it again."""
    return await _everywhere(url, [], _OFF, [sql.SQL(_GONE)])


async def end_connections(url: str) -> bool:
    """End every other connection to the server; False if it cannot be reached: call it again."""
    try:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            await connection.execute(_END_OTHERS)
    except psycopg.OperationalError:
        return False
    return True


async def count_open_jobs(url: str) -> int:
    """Return how many jobs are not in a final state."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        cursor = await connection.execute(_COUNT_OPEN, [[int(state) for state in FINAL_STATES]])
        row = await cursor.fetchone()
    return 0 if row is None else int(row[0])


async def is_held(url: str) -> bool:
    """Return whether the installation is held."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        return await (await connection.execute("SELECT 1 FROM hold")).fetchone() is not None


class CopiedDatabase:
    """Sets a database aside, and puts a copy in its place. Each step can be repeated."""

    def __init__(self, url: Callable[[], str], name: str = "outbox") -> None:
        """`url` returns the superuser's URL of another database."""
        self._url = url
        self._name = name
        # The names of the database that was set aside, and of the copy.
        self.aside = f"{name}_aside"
        self.copy = f"{name}_copy"

    async def set_aside(self) -> None:
        """End all connections, and rename the database, so that nobody writes any more."""
        async with self._connected() as connection:
            if self.aside not in await self._names(connection):
                await _alter(connection, "ALTER DATABASE {} ALLOW_CONNECTIONS false", self._name)
                await connection.execute(_END_OF_DATABASE, [self._name])
                await _alter(connection, "ALTER DATABASE {} RENAME TO {}", self._name, self.aside)
            await _alter(connection, "ALTER DATABASE {} ALLOW_CONNECTIONS true", self.aside)

    async def make_empty(self) -> None:
        """Make an empty database for the copy, in place of one that is incomplete."""
        async with self._connected() as connection:
            await _alter(connection, "DROP DATABASE IF EXISTS {} (FORCE)", self.copy)
            await _alter(connection, "CREATE DATABASE {} OWNER outbox", self.copy)

    async def put_in_place(self) -> None:
        """Give the copy the name of the database, and drop the database that was set aside."""
        async with self._connected() as connection:
            if self._name not in await self._names(connection):
                await _alter(connection, "ALTER DATABASE {} RENAME TO {}", self.copy, self._name)
            await _alter(connection, "DROP DATABASE IF EXISTS {} (FORCE)", self.aside)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[_Connection]:
        async with await psycopg.AsyncConnection.connect(
            self._url(), autocommit=True
        ) as connection:
            yield connection

    async def _names(self, connection: _Connection) -> set[str]:
        rows = await connection.execute("SELECT datname FROM pg_database")
        return {name for (name,) in await rows.fetchall()}


async def _alter(connection: _Connection, words: LiteralString, *names: str) -> None:
    await connection.execute(sql.SQL(words).format(*map(sql.Identifier, names)))


async def store_key(url: str, key: NewKey, user_id: str | None) -> None:
    """Store the API key of a user or, if it is None, of an operator: as `outbox keys create`."""
    kind = ApiKeyKind.OPERATOR if user_id is None else ApiKeyKind.USER
    engine = create_engine(load_settings(database_url=url))
    try:
        async with engine.begin() as connection:
            await insert_key(connection, key, kind, user_id, "drill")
    finally:
        await engine.dispose()


async def limit_users(url: str, limits: Mapping[str, UserSendLimits]) -> None:
    """Give users limits before they have senders. The audit then judges all their mail."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        for user_id, limit in limits.items():
            gap_ms = limit.gap // timedelta(milliseconds=1) or None
            await connection.execute(_LIMIT_USER, [user_id, limit.hourly_limit or None, gap_ms])


async def markers_of(url: str, user_id: str) -> list[int] | None:
    """Return the markers of the user's senders: changes that may not be loaded yet.

    None means that PostgreSQL cannot be reached.
    """
    try:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            rows = await (await connection.execute(_MARKERS_OF, [user_id])).fetchall()
    except psycopg.OperationalError:
        return None
    return [int(marker) for (marker,) in rows]


async def are_loaded(url: str, markers: Sequence[int]) -> bool:
    """Return whether no marker is left; False if PostgreSQL cannot be reached."""
    try:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            row = await (await connection.execute(_ANY_OF, [list(markers)])).fetchone()
    except psycopg.OperationalError:
        return False
    return row is None


async def _everywhere(
    url: str, before: Sequence[_Statement], each: str, after: Sequence[_Statement]
) -> bool:
    # One table per transaction: holding locks of several tables could block or deadlock others.
    try:
        async with await psycopg.AsyncConnection.connect(
            url, autocommit=True, options=_SETTINGS
        ) as connection:
            tables = await (await connection.execute(_TABLES)).fetchall()
            on_each = [sql.SQL(each).format(table=sql.Identifier(name)) for (name,) in tables]
            for statement in (*before, *on_each, *after):
                await connection.execute(statement)
    except (psycopg.OperationalError, errors.ReadOnlySqlTransaction):
        # It is away, or a replica that is about to take over.
        return False
    return True
