"""`python -m bench.retention`: the cost of removing a million old jobs while mail is sent.

The stats service removes them, as in production. Mail is due at an even rate before and during the
removal, so its lateness shows the effect.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg

from bench.filling import add_jobs, add_senders
from bench.world import BenchStack, world

SENDERS = 100
OLD = 1_000_000
DUE_A_SECOND = 20
# Rows per sender: enough for the longest expected removal.
ROWS = 120
BEFORE_S = 20.0
_MOST_S = 550
_LATENESS = """
SELECT count(*), coalesce(percentile_cont(0.50) WITHIN GROUP (ORDER BY late), 0),
       coalesce(percentile_cont(0.99) WITHIN GROUP (ORDER BY late), 0)
FROM (SELECT 1000 * extract(epoch FROM a.started_at - j.scheduled_at) AS late
      FROM attempts a JOIN email_jobs j ON j.id = a.email_job_id
      WHERE a.ended_at BETWEEN to_timestamp({}) AND to_timestamp({})) AS each
"""
_FILL = (
    """
INSERT INTO senders (user_id, email, hourly_limit) VALUES ('bench', 'old@example.com', 1000)
""",
    """
INSERT INTO batches (user_id, sender_id, request_id, request_hash, start_at, duplicates, mode,
                     created_at, accepted_count)
SELECT 'bench', (SELECT min(id) FROM senders), 'old' || n, '', now(), 1, 1,
       now() - interval '200 days', 1000 FROM generate_series(1, 1000) AS n
""",
    """
INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient, variables, state,
                        attempt, finished_at)
SELECT batches.id, sender_id, now() - interval '150 days', n, 'r' || n || '@example.net',
       '["Ann Example", "00000001", "Springfield"]', 3, 1,
       now() - interval '150 days' + (batches.id * 1000 + n) * interval '1 second'
FROM batches, generate_series(1, 1000) AS n WHERE request_id LIKE 'old%'
""",
    """
INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome, counted,
                      message)
SELECT id, 1, sender_id, finished_at - interval '1 second', finished_at, 1, true,
       '2.0.0 Ok: queued as 4XyZ12345' FROM email_jobs WHERE state = 3
""",
    "VACUUM ANALYZE",
)


async def _one_row(stack: BenchStack, query: str) -> tuple[float, ...]:
    async with await psycopg.AsyncConnection.connect(stack.database_url) as connection:
        row = await (await connection.execute(query.encode())).fetchone()
        if row is None:
            raise RuntimeError(query)
        return tuple(float(value) for value in row)


async def _removed(stack: BenchStack) -> float:
    (jobs,) = await _one_row(stack, "SELECT coalesce(sum(n), 0) FROM purged_counts")
    return jobs


async def measure(stack: BenchStack) -> dict[str, float]:
    """Send mail, start the removal after a while, and compare."""
    async with await psycopg.AsyncConnection.connect(
        stack.database_url, autocommit=True
    ) as connection:
        for statement in _FILL:
            await connection.execute(statement.encode())
        start = datetime.now(UTC) + timedelta(seconds=10)
        ids = await add_senders(connection, SENDERS)
        spacing = timedelta(seconds=SENDERS / DUE_A_SECOND)
        await add_jobs(connection, ids, ROWS, start=start, spacing=spacing)
    with stack.process("dispatcher", dispatcher_concurrency="20"):
        # Mail that fell due before the dispatcher was ready is sent first.
        await asyncio.sleep(max(0.0, (start - datetime.now(UTC)).total_seconds()) + 10)
        alone = time.time()
        await asyncio.sleep(BEFORE_S)
        with stack.process("stats", retention="90d"):
            began = time.time()
            while await _removed(stack) < OLD:
                if time.time() - began > _MOST_S:
                    raise SystemExit("the removal did not end")
                await asyncio.sleep(0.25)
            ended = time.time()
    before = await _one_row(stack, _LATENESS.format(alone, began))
    during = await _one_row(stack, _LATENESS.format(began, ended))
    return {
        "removal_s": ended - began,
        "removed_jobs_per_s": OLD / (ended - began),
        "before_mails_per_s": before[0] / (began - alone),
        "before_lateness_ms_p50": before[1],
        "before_lateness_ms_p99": before[2],
        "during_mails_per_s": during[0] / (ended - began),
        "during_lateness_ms_p50": during[1],
        "during_lateness_ms_p99": during[2],
    }


async def _run() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="outbox-bench-") as folder:
        async with world(Path(folder)) as stack:
            return await measure(stack)


if __name__ == "__main__":
    for name, value in asyncio.run(_run()).items():
        sys.stdout.write(f"{name} {value:,.1f}\n")
