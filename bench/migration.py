"""`python -m bench.migration`: migrates a large database while it is written to.

The schema starts at the first revision, with `--rows` jobs; half of them are sent. Then all
migrations run, followed by those of an imagined next release in tests/next_release: columns, a
constraint and its validation, and an index. Writers measure their longest wait meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, Final

import psycopg
from rich.console import Console
from rich.table import Table

from outbox_server.deploy.embedded.stack import Servers
from outbox_server.shared.database.migrating import migrate

FIRST: Final = "0001"
SENDERS: Final = 100
WRITERS: Final = 3
# The longest permitted wait of a writer, in ms. If a wait for a lock is longer, PostgreSQL ends it
# with an error.
LONGEST_WAIT_MS: Final = 1000
_NEXT: Final = Path(__file__).parents[1] / "tests" / "next_release"

# Written for the schema of the first revision; later revisions have these columns as well.
_FILL: Final = (
    """
    INSERT INTO senders (user_id, email, hourly_limit)
    SELECT 'ann', 'old' || i || '@example.com', 1000000 FROM generate_series(1, %(senders)s) AS i
    """,
    """
    INSERT INTO batches (user_id, sender_id, request_id, request_hash, subject, body, start_at,
                         duplicates, mode, accepted_count)
    SELECT user_id, id, 'r' || id, '\\x00', 'Mail', 'Hello', now(), 1, 1, 2 * %(half)s FROM senders
    """,
    """
    INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient, state,
                            attempt, finished_at)
    SELECT b.id, sender_id, now() + least(i / %(half)s, 1) * %(later)s::interval, i,
           'r' || i || '@example.net', CASE WHEN i < %(half)s THEN 3 ELSE 1 END,
           CASE WHEN i < %(half)s THEN 1 ELSE 0 END, CASE WHEN i < %(half)s THEN now() END
    FROM batches AS b, generate_series(0, 2 * %(half)s - 1) AS i
    """,
    """
    INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome, counted)
    SELECT id, 1, sender_id, finished_at, finished_at, 1, true FROM email_jobs WHERE state = 3
    """,
    """
    INSERT INTO count_deltas (sender_id, batch_id, hour, state, n)
    SELECT sender_id, batch_id, date_trunc('hour', coalesce(finished_at, scheduled_at)), state,
           count(*)
    FROM email_jobs GROUP BY 1, 2, 3, 4
    """,
)
# The statements of services: an intake, a claim, a settlement, and a read of one job.
_WRITES: Final = (
    """
    INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient)
    SELECT id, sender_id, now() + interval '30 d', 1, 'new@example.net' FROM batches
    ORDER BY id LIMIT 1
    """,
    "UPDATE email_jobs SET state = 2, lease_until = now() WHERE id = %(job)s AND state = 1",
    "UPDATE email_jobs SET state = 1, lease_until = NULL WHERE id = %(job)s AND state = 2",
    """
    INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome, counted)
    SELECT id, attempt + %(n)s, sender_id, now(), now(), 2, false FROM email_jobs
    WHERE id = %(job)s ON CONFLICT DO NOTHING
    """,
    "SELECT id FROM email_jobs WHERE id = %(job)s",
    "UPDATE senders SET revision = revision + 1 WHERE id = 1 + %(n)s %% 100",
)


def fill(url: str, rows: int, *, senders: int = SENDERS, later: str = "30 d") -> None:
    """Insert senders with `rows` jobs in all: half of them sent, the others due after `later`."""
    half = rows // senders // 2
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in _FILL:
            connection.execute(
                statement.encode(), {"senders": senders, "half": half, "later": later}
            )
        connection.execute("ANALYZE")


class Writers:
    """Sessions that write as the services do and measure how long each statement takes."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = Event()
        self.statements = 0
        # Statements that waited for a lock for longer than LONGEST_WAIT_MS.
        self.refused = 0
        self.longest_s = 0.0

    def run_beside(self, work: Callable[[], None]) -> None:
        """Run `work` while the writers write."""
        with ThreadPoolExecutor(WRITERS) as pool:
            writing = [pool.submit(self._write, number) for number in range(1, WRITERS + 1)]
            try:
                work()
            finally:
                self._stop.set()
            for each in writing:
                each.result()

    def _write(self, number: int) -> None:
        options = f"-c lock_timeout={LONGEST_WAIT_MS}"
        with psycopg.connect(self._url, autocommit=True, options=options) as connection:
            n = number
            while not self._stop.is_set():
                for statement in _WRITES:
                    begun = time.perf_counter()
                    try:
                        connection.execute(statement.encode(), {"job": n, "n": n % 1000 + 2})
                    except psycopg.errors.LockNotAvailable:
                        self.refused += 1
                    self.longest_s = max(self.longest_s, time.perf_counter() - begun)
                    self.statements += 1
                n += WRITERS


def measure(url: str, rows: int, say: Callable[[str], None]) -> dict[str, float]:
    """Fill an empty database, migrate it under load, and return the figures."""
    migrate(url, revision=FIRST)
    begun = time.perf_counter()
    fill(url, rows)
    say(f"{rows} rows after {time.perf_counter() - begun:.0f} s")
    writers = Writers(url)
    begun = time.perf_counter()
    writers.run_beside(lambda: migrate(url, say=say, more_versions=_NEXT))
    return {
        "rows": rows,
        "migration_s": time.perf_counter() - begun,
        "statements_meanwhile": writers.statements,
        "longest_statement_ms": writers.longest_s * 1000,
        "lock_waits_over_1_s": writers.refused,
    }


async def _run(rows: int) -> dict[str, float]:
    started = time.monotonic()

    def say(line: str) -> None:
        Console(stderr=True).print(f"{time.monotonic() - started:7.1f} s  {line}", highlight=False)

    with tempfile.TemporaryDirectory(prefix="outbox-bench-") as name:
        async with Servers(Path(name), inbox=False) as servers:
            return await asyncio.to_thread(measure, servers.database_url, rows, say)


def main(arguments: list[str]) -> int:
    """Measure and print; return 1 if a writer waited for a lock for longer than a second."""
    parser = argparse.ArgumentParser(prog="python -m bench.migration", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    figures: dict[str, Any] = asyncio.run(_run(parser.parse_args(arguments).rows))
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.1f}")
    Console().print(table)
    return 1 if figures["lock_waits_over_1_s"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
