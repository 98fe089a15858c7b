"""Databases with many rows, which are filled once for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import psycopg
from psycopg import sql

from tests.conftest import Stores


@contextmanager
def filled_databases(
    stores: Stores, name: str, statements: Sequence[str], tables: Sequence[str]
) -> Iterator[Mapping[bool, str]]:
    """Yield the names of two databases with the same rows: without and with statistics of them.

    `statements` fill the `tables`. PostgreSQL does not analyse or vacuum these tables by itself.
    """
    names = {False: name, True: f"{name}_analysed"}
    with psycopg.connect(stores.clone(names[False]), autocommit=True) as connection:
        for table in tables:
            change = sql.SQL("ALTER TABLE {} SET (autovacuum_enabled = false)")
            connection.execute(change.format(sql.Identifier(table)))
        for statement in statements:
            connection.execute(statement.encode())
    with psycopg.connect(stores.clone(names[True], names[False]), autocommit=True) as connection:
        connection.execute("ANALYZE")
    yield names
    for made in names.values():
        stores.administrate(sql.SQL("DROP DATABASE {} (FORCE)").format(sql.Identifier(made)))
