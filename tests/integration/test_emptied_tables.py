"""Changes of some jobs read no others, even while PostgreSQL takes its tables for empty.

It does so until ANALYZE has run after a large batch, if all jobs before had been removed.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.dispatcher.storage.recovering import recover_expired
from outbox_server.services.scheduler.storage.cancelling import end_waiting, sweep
from outbox_server.services.scheduler.storage.erasing import erase_jobs
from outbox_server.services.scheduler.storage.job_changes import write_part
from outbox_server.services.scheduler.storage.reopening import retry_named
from outbox_server.services.scheduler.storage.respreading import respread_part
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.database.models import EmailJob
from outbox_server.shared.retention.storage import remove_jobs
from outbox_server.shared.settings import load_settings
from outbox_server.shared.states import JobState
from tests.conftest import Stores
from tests.filled_databases import Statistics, filled_databases

EACH: Final = 4_000
# How many jobs each call changes.
CHANGED: Final = 1_000
LONG_AGO: Final = datetime(2001, 1, 1, tzinfo=UTC)
# Batch 1 waits, 2 has failed long ago, 3 is being sent and its leases have expired, 4 is cancelled,
# 5 gets new times, and some jobs of 6 are rescheduled.
_FILL: Final = f"""
INSERT INTO senders (user_id, email, hourly_limit) VALUES ('u', 's@x.org', 9);
INSERT INTO batches (user_id, sender_id, request_id, request_hash, start_at, duplicates, mode,
                     accepted_count, respreading)
SELECT 'u', 1, n::text, '', now(), 1, 1, {EACH}, n = 5 FROM generate_series(1, 6) AS n;
INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient, state, attempt,
                        finished_at, lease_until)
SELECT b, 1, now(), n, 'r' || n / {CHANGED} || '@y.test',
       CASE b WHEN 2 THEN 4 WHEN 3 THEN 2 ELSE 1 END, 1,
       CASE b WHEN 2 THEN TIMESTAMPTZ '2002-01-01' END,
       CASE b WHEN 3 THEN TIMESTAMPTZ '2002-01-01' END
FROM generate_series(1, 6) AS b, generate_series(0, {EACH - 1}) AS n;
INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome, counted,
                      message)
SELECT id, 1, 1, finished_at, finished_at, 3, true, 'no' FROM email_jobs WHERE batch_id = 2;
INSERT INTO batch_cancellations (batch_id, sender_id, cancelled_at) VALUES (4, 1, now());
INSERT INTO batch_respreads (batch_id, start_at, spacing_ms) VALUES (5, now(), 1);
INSERT INTO job_changes (batch_id, sender_id, kind, changed_at, delay, n, step)
VALUES (6, 1, 2, now(), interval '1 hour', {CHANGED}, {CHANGED // 64});
INSERT INTO job_change_blocks (change_id, block, bits)
SELECT 1, id >> 6, bit_or(1::bigint << (id & 63)::int) FROM email_jobs
WHERE batch_id = 6 GROUP BY 2 ORDER BY 2 LIMIT {CHANGED // 64};
"""
_FIRST: Final = EmailJob.row_number < CHANGED
CALLS: Final[Mapping[str, Callable[[AsyncConnection], Awaitable[Any]]]] = {
    "end waiting jobs": lambda c: end_waiting(
        c, (EmailJob.batch_id == 1) & _FIRST, JobState.SUPPRESSED
    ),
    "retry": lambda c: retry_named(c, 2, _FIRST),
    "remove": lambda c: remove_jobs(c, timedelta(days=90), LONG_AGO, CHANGED),
    "erase": lambda c: erase_jobs(c, "u", "r0@y.test"),
    "recover": lambda c: recover_expired(c, timedelta(minutes=1), JobState.SCHEDULED),
    "sweep": partial(sweep, batch_id=4, limit=CHANGED),
    "give new times": partial(respread_part, batch_id=5, limit=CHANGED),
    "reschedule": partial(write_part, change_id=1),
}


@pytest.fixture(scope="module")
def database(stores: Stores) -> Iterator[str]:
    tables = ("senders", "batches", "email_jobs", "attempts")
    with filled_databases(stores, "outbox_emptied", _FILL.strip().split(";\n"), tables) as names:
        yield stores.postgres.url(names[Statistics.OF_EMPTY_TABLES])


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(load_settings(database_url=url))
    try:
        yield engine
    finally:
        await engine.dispose()


@pytest.mark.parametrize("name", CALLS)
async def test_a_change_compares_no_job_with_all_others(database: str, name: str) -> None:
    ran: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        ran.append((statement, parameters))

    async with connected(database) as engine, engine.connect() as connection:
        event.listen(engine.sync_engine, "before_cursor_execute", note)
        await CALLS[name](connection)
        event.remove(engine.sync_engine, "before_cursor_execute", note)
        # Nothing is committed, so the same statements now do the same.
        await connection.rollback()
        changed = read = 0
        report: list[str] = []
        for statement, parameters in ran:
            explained = await connection.exec_driver_sql(
                f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {statement}", parameters
            )
            plan = explained.scalar_one()
            plan = json.loads(plan) if isinstance(plan, str) else plan
            for node, rows in rows_of(plan[0]["Plan"]):
                if node.startswith("ModifyTable on email_jobs"):
                    changed += rows
                read += rows
                report.append(f"{rows:9.0f} {node}")
        await connection.rollback()
    assert changed >= CHANGED / 2, "\n".join(report)
    # Each row once or twice to find it, and once to change it; a bitmap scan counts it twice.
    assert read <= 3 * 6 * EACH, "\n".join(report)


def rows_of(node: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield how many rows each node has read or compared, those that it left out included."""
    rows = node["Actual Rows"]
    rows += sum(number for key, number in node.items() if key.startswith("Rows Removed by"))
    name = f"{node['Node Type']} on {node.get('Relation Name', '')}"
    yield name, int(rows * node["Actual Loops"])
    for inner in node.get("Plans", ()):
        yield from rows_of(inner)
