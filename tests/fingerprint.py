"""The contents of all tables, to check that a call changed nothing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import psycopg
from psycopg import sql

from outbox_server.shared.database.models import Base
from tests.eventually import eventually

# Counts may be folded at any time, and a marker is deleted when its head is loaded. Events are
# counted now and then.
MOVING: Final = (
    "job_event_counting",
    "job_event_counts",
    "count_deltas",
    "batch_counts",
    "sender_counts",
    "sender_hour_counts",
    "head_markers",
)


class Fingerprint:
    """Return the contents of all tables."""

    def __init__(self, database_url: str, but: Collection[str] = ()) -> None:
        """`but` names tables whose contents do not count."""
        self._url = database_url
        self._left_out = {*MOVING, *but}

    async def take(self) -> dict[str, Any]:
        """Return each table's number of rows and hash, by the table's name.

        The mail of a cancelled batch is cancelled after the call's answer: wait until it is.
        """
        of_a_table = sql.SQL(
            "SELECT {}, count(*), md5(string_agg(t::text, '|' ORDER BY t::text)) FROM {} t"
        )
        # One statement: a connection and a plan for each table take longer than reading its
        # contents.
        statement = sql.SQL(" UNION ALL ").join(
            of_a_table.format(sql.Literal(table.name), sql.Identifier(table.name))
            for table in Base.metadata.sorted_tables
            if table.name not in self._left_out
        )
        async with await psycopg.AsyncConnection.connect(self._url, autocommit=True) as connection:
            await eventually(lambda: _no_batch_is_being_cancelled(connection))
            rows = await (await connection.execute(statement)).fetchall()
        return {name: found for name, *found in rows}


async def _no_batch_is_being_cancelled(connection: psycopg.AsyncConnection) -> bool:
    found = await connection.execute(
        "SELECT NOT EXISTS (SELECT FROM batch_cancellations)"
        " AND NOT EXISTS (SELECT FROM job_changes)"
    )
    (done,) = await found.fetchone() or (False,)
    return bool(done)
