"""Measures how soon an emptied Redis is rebuilt, and for how long no mail is sent meanwhile."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

import psycopg
from redis.asyncio import Redis

from bench.world import BenchStack

SENDERS, WAITING, HISTORY = 1_000, 1_000, 100
_LIMIT_S = 60.0
# The longest rebuild at this size that Outbox promises.
_PROMISED_S = 3
_WATCHED = timedelta(seconds=10)

# Each sender has waiting mails, half of them due, and some mails sent in the last hour.
_FILL = (
    """
    INSERT INTO senders (user_id, email, hourly_limit)
    SELECT 'bench', 's' || i || '@example.com', 1000000 FROM generate_series(1, %(senders)s) AS i
    """,
    """
    INSERT INTO batches (user_id, sender_id, request_id, request_hash, subject, body, start_at,
                         duplicates, mode, accepted_count)
    SELECT user_id, id, 'r' || id, '\\x00', 'Mail', 'Hello', now(), 1, 1, %(waiting)s FROM senders
    """,
    """
    INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient)
    SELECT b.id, sender_id, now() + (i - %(waiting)s / 2) * interval '1 minute', i,
           'r' || i || '@example.net'
    FROM batches AS b, generate_series(1, %(waiting)s) AS i
    """,
    """
    INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome, counted)
    SELECT -s.id * %(history)s - i, 1, s.id, now() - (i || ' s')::interval,
           now() - (i || ' s')::interval, 1, true
    FROM senders AS s, generate_series(1, %(history)s) AS i
    """,
)
_SILENCE = """
    SELECT extract(epoch FROM max(pause)), count(*) FROM (
        SELECT started_at - lag(started_at, 1, %(lost)s) OVER (ORDER BY started_at) AS pause
        FROM attempts WHERE started_at BETWEEN %(lost)s AND %(lost)s + %(watched)s
    ) AS each
"""


async def healing(stack: BenchStack) -> dict[str, float]:
    """Empty Redis under load: a million waiting jobs, a thousand senders, gaps of 2 s."""
    size = {"senders": SENDERS, "waiting": WAITING, "history": HISTORY}
    async with (
        await psycopg.AsyncConnection.connect(stack.database_url, autocommit=True) as connection,
        Redis.from_url(stack.servers.redis_url) as redis,
    ):
        for statement in _FILL:
            await connection.execute(statement, size)
        await connection.execute("ANALYZE")
        with stack.process("dispatcher", dispatcher_concurrency="20", min_gap="2s"):
            await _until_rebuilt(redis)
            await asyncio.sleep(_WATCHED.total_seconds() / 2)
            cursor = await connection.execute("SELECT clock_timestamp()")
            row = await cursor.fetchone()
            await redis.flushall()
            took = await _until_rebuilt(redis)
            await asyncio.sleep(_WATCHED.total_seconds())
        if row is None:
            raise RuntimeError("PostgreSQL has no time")
        cursor = await connection.execute(_SILENCE, {"lost": row[0], "watched": _WATCHED})
        found = await cursor.fetchone()
        if found is None or found[0] is None:
            raise SystemExit("nothing was sent after FLUSHALL")
        silence, sent = found
        if silence > _PROMISED_S:
            raise SystemExit(f"nothing was sent for {silence:.1f} s after FLUSHALL")
    return {
        "heal_after_flushall_s": took,
        "silence_after_flushall_s": float(silence),
        "sent_after_flushall_per_s": sent / _WATCHED.total_seconds(),
    }


async def _until_rebuilt(redis: Redis) -> float:
    """Return the seconds until every sender is loaded."""
    started = time.monotonic()
    while not await redis.exists("outbox:{0}:generation"):
        if time.monotonic() - started > _LIMIT_S:
            raise SystemExit("Redis was not rebuilt within a minute")
        await asyncio.sleep(0.02)
    return time.monotonic() - started
