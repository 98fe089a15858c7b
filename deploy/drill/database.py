"""All SQL of a drill. Triggers make writes fail as on a full disk or in a conflict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import psycopg
from psycopg import errors, sql

from outbox_server.shared.auth.keys import ApiKeyKind, NewKey
from outbox_server.shared.auth.store import insert_key
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.settings import load_settings
from outbox_server.shared.states import FINAL_STATES

_Statement: TypeAlias = sql.SQL | sql.Composed

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


async def store_user_key(url: str, key: NewKey, user_id: str) -> None:
    """Store the API key of a user, as `outbox keys create --user` does."""
    engine = create_engine(load_settings(database_url=url))
    try:
        async with engine.begin() as connection:
            await insert_key(connection, key, ApiKeyKind.USER, user_id, "drill")
    finally:
        await engine.dispose()


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
