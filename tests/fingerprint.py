"""What the tables hold, to see that a call has changed nothing."""

from __future__ import annotations

from typing import Any, Final

import psycopg
from psycopg import sql

from shared.models import Base

# Counts are folded meanwhile, and a marker goes when its head is loaded.
MOVING: Final = (
    "count_deltas",
    "batch_counts",
    "sender_counts",
    "sender_hour_counts",
    "head_markers",
)


class Fingerprint:
    """What all tables hold."""

    def __init__(self, database_url: str) -> None:
        self._url = database_url

    async def take(self) -> dict[str, Any]:
        async with await psycopg.AsyncConnection.connect(self._url, autocommit=True) as connection:
            found = {}
            for table in Base.metadata.sorted_tables:
                if table.name in MOVING:
                    continue
                text = sql.SQL(
                    "SELECT count(*), md5(string_agg(t::text, '|' ORDER BY t::text)) FROM {} t"
                ).format(sql.Identifier(table.name))
                found[table.name] = await (await connection.execute(text)).fetchone()
            return found
