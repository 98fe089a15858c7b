"""Databases with many rows, which are filled once for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum

import psycopg
from psycopg import sql

from outbox_server.deploy.embedded.passwords import SUPERUSER
from tests.conftest import Stores


class Statistics(StrEnum):
    """What PostgreSQL knows about the rows of a filled database."""

    NONE = "just filled"
    OF_EMPTY_TABLES = "filled after all rows had been removed"
    CURRENT = "analysed"


@contextmanager
def filled_databases(
    stores: Stores, name: str, statements: Sequence[str], tables: Sequence[str]
) -> Iterator[Mapping[Statistics, str]]:
    """Yield the names of databases with the same rows, by PostgreSQL's statistics of them.

    `statements` fill the `tables`, which PostgreSQL does not analyse or vacuum by itself.
    """
    names = {each: f"{name}_{each.name.lower()}" for each in Statistics}
    template = names[Statistics.NONE]
    with psycopg.connect(stores.clone(template), autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())
    with psycopg.connect(
        stores.clone(names[Statistics.CURRENT], template), autocommit=True
    ) as connection:
        connection.execute("ANALYZE")
    stores.clone(names[Statistics.OF_EMPTY_TABLES], template)
    url = stores.postgres.url(names[Statistics.OF_EMPTY_TABLES], SUPERUSER)
    with psycopg.connect(url, autocommit=True) as connection:
        # As ANALYZE leaves it after DELETE. The planner expects as many rows on each page as then.
        connection.execute(
            "UPDATE pg_class SET reltuples = 0, relpages = pg_relation_size(oid) / 8192"
            " WHERE oid = ANY(%s::regclass[])"
            " OR oid IN (SELECT indexrelid FROM pg_index WHERE indrelid = ANY(%s::regclass[]))",
            [list(tables), list(tables)],
        )
    yield names
    for made in names.values():
        stores.administrate(sql.SQL("DROP DATABASE {} (FORCE)").format(sql.Identifier(made)))
