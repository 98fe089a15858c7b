"""The permitted steps of a migration, by squawk's rules: the last release keeps running."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import event
from sqlalchemy.engine import Engine

_SQUAWK: Final = Path(sys.executable).with_name("squawk")
# The migrating session sets its time limits itself. The other rules are matters of taste.
_IGNORED: Final = (
    "require-lock-timeout",
    "require-statement-timeout",
    "prefer-bigint-over-int",
    "prefer-bigint-over-smallint",
    "prefer-identity",
    "prefer-robust-stmts",
    "prefer-text-field",
    "prefer-timestamp-tz",
)
# A contract step removes columns and tables that no release uses. No step renames or retypes any.
CONTRACT: Final = frozenset({"ban-drop-column", "ban-drop-table"})
# Statements of the migrating session itself.
_OURS: Final = re.compile(r"\s*(SELECT|SET)\b|.*\balembic_version\b", re.DOTALL)
_LOCKED: Final = """
    SELECT relname FROM pg_locks JOIN pg_class ON pg_class.oid = relation
    WHERE pid = pg_backend_pid() AND mode IN ('AccessExclusiveLock', 'ShareRowExclusiveLock')
        AND relkind = 'r' AND relnamespace = 'public'::regnamespace
"""
_CREATED: Final = re.compile(r"\s*CREATE TABLE (\w+)")
_LOCKS: Final = re.compile(r"LOCK TABLE (.*) IN ACCESS EXCLUSIVE MODE")
_MOVES_DATA: Final = re.compile(r"\s*(UPDATE|DELETE)\b", re.IGNORECASE)


def broken_rules(statements: Sequence[str]) -> set[str]:
    """Return the names of the rules that the statements of one migration break."""
    sql = ";\n".join(statements) + ";\n"
    excluded = [word for rule in _IGNORED for word in ("--exclude", rule)]
    done = subprocess.run(
        [_SQUAWK, "--reporter", "json", "--pg-version", "14", *excluded],
        input=sql,
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert done.returncode in (0, 1), done.stderr
    found = {finding["rule_name"] for finding in json.loads(done.stdout)}
    # Services change rows in small batches; migrations do not.
    return found | {"moves-data" for one in statements if _MOVES_DATA.match(one)}


@contextmanager
def recorded_statements() -> Iterator[tuple[Mapping[str, list[str]], Any]]:
    """Record the statements of migrations by revision. The second value is `say` for `migrate`."""
    found: dict[str, list[str]] = defaultdict(list)
    current: list[str] = []

    def record(connection: Any, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        del cursor, parameters
        if _OURS.match(statement):
            return
        if connection.connection.dbapi_connection.autocommit:
            current.append(statement)
        else:
            current.extend(("BEGIN", statement))

    def say(line: str) -> None:
        revision = line.partition(":")[0]
        # A transaction has one BEGIN and one COMMIT.
        first = current.index("BEGIN") if "BEGIN" in current else None
        kept = [one for n, one in enumerate(current) if one != "BEGIN" or n == first]
        found[revision] = [*kept, "COMMIT"] if first is not None else kept
        current.clear()

    event.listen(Engine, "before_cursor_execute", record)
    try:
        yield found, say
    finally:
        event.remove(Engine, "before_cursor_execute", record)


@contextmanager
def recorded_locks() -> Iterator[tuple[Mapping[str, tuple[set[str], set[str]]], Any]]:
    """Record which existing tables each migration locks: in all, and by its first statement.

    The second value is `say` for `migrate`.
    """
    found: dict[str, tuple[set[str], set[str]]] = {}
    locked: set[str] = set()
    statements: list[str] = []

    def record(connection: Any, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        del cursor, parameters
        if not _OURS.match(statement):
            statements.append(statement)
        elif statement.lstrip().startswith("UPDATE"):
            locked.update(name for (name,) in connection.connection.execute(_LOCKED))

    def say(line: str) -> None:
        created = {match[1] for one in statements if (match := _CREATED.match(one))}
        first = _LOCKS.fullmatch(statements[0]) if statements else None
        names = set(first[1].split(", ")) if first else set[str]()
        found[line.partition(":")[0]] = (locked - created, names)
        locked.clear()
        statements.clear()

    event.listen(Engine, "before_cursor_execute", record)
    try:
        yield found, say
    finally:
        event.remove(Engine, "before_cursor_execute", record)
