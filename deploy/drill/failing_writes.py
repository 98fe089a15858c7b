"""PostgreSQL refuses writes, with the SQLSTATE of a full disk or a conflict: by triggers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import psycopg
from psycopg import sql

_Statement: TypeAlias = sql.SQL | sql.Composed

# Whoever wants a lock of a table makes all others queue behind: not for longer than this.
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


async def fail_writes(url: str, state: str, share: float) -> bool:
    """Let this share of all writing statements fail with an SQLSTATE; False: say it once more."""
    fail = sql.SQL(_FAIL).format(share=sql.Literal(share), state=sql.Literal(state))
    return await _everywhere(url, [fail], _ON, [])


async def heal_writes(url: str) -> bool:
    """Let writes be as before; False: not all are yet, say it once more."""
    return await _everywhere(url, [], _OFF, [sql.SQL(_GONE)])


async def _everywhere(
    url: str, before: Sequence[_Statement], each: str, after: Sequence[_Statement]
) -> bool:
    # Each on its own: whoever holds the locks of several tables may be waited for by another one.
    try:
        async with await psycopg.AsyncConnection.connect(
            url, autocommit=True, options=_SETTINGS
        ) as connection:
            tables = await (await connection.execute(_TABLES)).fetchall()
            on_each = [sql.SQL(each).format(table=sql.Identifier(name)) for (name,) in tables]
            for statement in (*before, *on_each, *after):
                await connection.execute(statement)
    except psycopg.OperationalError:
        return False
    return True
