"""Fills a database with senders, batches and jobs by few statements, as if callers had sent them.

Rows, counts and jobs agree with one another, as after an intake whose deltas were folded.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import psycopg
from psycopg import sql

USER: Final = "bench"
SUBJECT: Final = "Your order {{ order }}"
BODY: Final = "Dear {{ name }},\n\nyour order {{ order }} leaves {{ city }} today.\n\nThe shop\n"
HTML: Final = "<p>Dear {{ name }},</p><p>your order <b>{{ order }}</b> leaves {{ city }} today.</p>"
Connection = psycopg.AsyncConnection[Any]

_SENDERS: Final = """
    INSERT INTO senders (user_id, email, hourly_limit, max_in_flight)
    SELECT %(user)s, %(name)s || i || '@example.com', 1000000, 20
    FROM generate_series(1, %(senders)s) AS i
    RETURNING id
"""
_BATCHES: Final = """
    INSERT INTO batches (user_id, sender_id, request_id, request_hash, subject, body, html,
                         variable_names, start_at, spacing_ms, duplicates, mode, accepted_count,
                         last_due_at)
    SELECT user_id, id, %(name)s || id, '\\x00', %(subject)s, %(body)s, %(html)s,
           '{name,order,city}', %(start)s, %(spacing_ms)s, 1, 1, %(per)s,
           %(start)s + (%(per)s - 1) * %(spacing)s
    FROM senders WHERE id = ANY(%(ids)s::bigint[]) ORDER BY id
    RETURNING id
"""
# `0 * b.id` makes PostgreSQL write the jobs of one batch after those of the other, as intakes do.
_JOBS: Final = """
    INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient, variables)
    SELECT b.id, b.sender_id,
           b.start_at + (n - 1) * %(spacing)s + place * %(spacing)s / %(batches)s, n,
           'r' || b.id || '-' || n || '@example.net',
           '["Ann Example ' || n || '","' || lpad(n::text, 8, '0') || '","Springfield"]'
    FROM (SELECT *, row_number() OVER (ORDER BY id) - 1 AS place FROM batches
          WHERE id = ANY(%(ids)s::bigint[])) AS b,
         LATERAL generate_series(1, %(per)s + 0 * b.id) AS n
"""
_COUNTS: Final = (
    """
    INSERT INTO sender_counts (sender_id, state, n)
    SELECT sender_id, 1, sum(accepted_count) FROM batches WHERE id = ANY(%(ids)s::bigint[])
    GROUP BY 1
    ON CONFLICT (sender_id, state) DO UPDATE SET n = sender_counts.n + excluded.n
    """,
    """
    INSERT INTO batch_counts (batch_id, state, n)
    SELECT id, 1, accepted_count FROM batches WHERE id = ANY(%(ids)s::bigint[])
    """,
)
# The jobs of these batches were sent a day ago; every twentieth has failed.
_ENDED: Final = """
    WITH ended AS (
        UPDATE email_jobs
        SET state = CASE WHEN row_number %% 20 = 0 THEN 4 ELSE 3 END, attempt = 1,
            finished_at = now() - interval '1 day'
        WHERE batch_id = ANY(%(ids)s::bigint[])
        RETURNING id, batch_id, sender_id, state, finished_at
    ), attempted AS (
        INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome,
                              counted, smtp_code, message)
        SELECT id, 1, sender_id, finished_at - interval '1 second', finished_at,
               CASE WHEN state = 3 THEN 1 ELSE 3 END, true,
               CASE WHEN state = 3 THEN 250 ELSE 550 END, 'Ok'
        FROM ended
    )
    INSERT INTO count_deltas (sender_id, batch_id, hour, state, n)
    SELECT sender_id, batch_id, date_trunc('hour', finished_at), each.state, sum(each.n)
    FROM ended, LATERAL (VALUES (1::smallint, -1), (ended.state, 1)) AS each (state, n)
    GROUP BY 1, 2, 3, 4
"""
_INDEXES: Final = """
    SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index
    WHERE indrelid = 'email_jobs'::regclass AND NOT indisprimary
"""


async def add_senders(connection: Connection, count: int, name: str = "s") -> list[int]:
    """Add senders of one user; return their ids."""
    values = {"user": USER, "name": name, "senders": count}
    return await _ids(connection, _SENDERS, values)


async def add_jobs(
    connection: Connection,
    sender_ids: list[int],
    per_sender: int,
    *,
    start: object,
    spacing: timedelta = timedelta(0),
    name: str = "b",
    ended: bool = False,
) -> list[int]:
    """Add a batch with `per_sender` jobs for each sender, the first at `start`; return the batches.

    With a spacing, the senders take turns evenly. If `ended`, all jobs were sent a day ago.
    """
    values = {
        "ids": sender_ids,
        "name": name,
        "subject": SUBJECT,
        "body": BODY,
        "html": HTML,
        "start": start,
        "spacing": spacing,
        "spacing_ms": round(spacing.total_seconds() * 1000),
        "per": per_sender,
        "batches": len(sender_ids),
    }
    batch_ids = await _ids(connection, _BATCHES, values)
    of_batches = values | {"ids": batch_ids}
    await connection.execute(_JOBS, of_batches)
    for statement in _COUNTS:
        await connection.execute(statement.encode(), of_batches)
    if ended:
        await connection.execute(_ENDED, of_batches)
    return batch_ids


@asynccontextmanager
async def without_indexes(connection: Connection) -> AsyncIterator[None]:
    """Drop the indexes of the jobs, and create them again at the end: for many rows."""
    found = await (await connection.execute(_INDEXES)).fetchall()
    for name, _ in found:
        await connection.execute(sql.SQL("DROP INDEX {}").format(sql.SQL(name)))
    yield
    await connection.execute("SET maintenance_work_mem = '512MB'")
    for _, definition in found:
        await connection.execute(definition.encode())


async def _ids(connection: Connection, statement: str, values: Mapping[str, Any]) -> list[int]:
    cursor = await connection.execute(statement.encode(), values)
    return [row[0] for row in await cursor.fetchall()]
