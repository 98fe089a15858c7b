"""`python -m bench.migration`: migrates a large database while it is written to.

The schema starts at the revision of the last release, or at `--revision`, with `--rows` jobs; half
of them are sent. Then all later migrations run, followed by those of an imagined next release in
tests/next_release: columns, a constraint and its validation, and an index. Meanwhile, writers
measure their longest statement, and PostgreSQL is asked how long its sessions wait for locks.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Final

import psycopg
from rich.console import Console
from rich.table import Table

from outbox_server.deploy.embedded.stack import Servers
from outbox_server.shared.database.migrating import migrate
from release.revisions import released_revisions

FIRST: Final = "0001"
SENDERS: Final = 100
WRITERS: Final = 3
WRITER: Final = "bench writer"
# Per sender, so that a step that reads all batches has something to read.
_BATCHES: Final = 1000
# The longest permitted wait of a writer, in ms. If a wait for a lock is longer, PostgreSQL ends it
# with an error.
LONGEST_WAIT_MS: Final = 1000
# The revision that added `recipient_key`, which an index of a later one has.
_KEYED: Final = "0002"
_WATCH_S: Final = 0.05
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
    SELECT user_id, id, 'r' || id || '-' || n, '\\x00', 'Mail', 'Hello', now(), 1, 1, 2 * %(half)s
    FROM senders, generate_series(1, %(batches)s) AS n
    """,
    """
    INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient, state,
                            attempt, finished_at{column})
    SELECT b.id, sender_id, now() + least(i / %(half)s, 1) * %(later)s::interval, i,
           'r' || i || '@example.net', CASE WHEN i < %(half)s THEN 3 ELSE 1 END,
           CASE WHEN i < %(half)s THEN 1 ELSE 0 END, CASE WHEN i < %(half)s THEN now() END{value}
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


def fill(
    url: str,
    rows: int,
    *,
    senders: int = SENDERS,
    batches: int = 1,
    later: str = "30 d",
    keyed: bool = False,
) -> None:
    """Insert senders with `rows` jobs in all: half of them sent, the others due after `later`.

    Each sender gets this number of `batches`. With `keyed`, one job of four has a `recipient_key`.
    """
    more = {
        "column": ", recipient_key" if keyed else "",
        "value": ", CASE WHEN i %% 4 = 0 THEN 'ü' || i || '@example.net' END" if keyed else "",
    }
    values = {
        "senders": senders,
        "batches": batches,
        "half": rows // senders // batches // 2,
        "later": later,
    }
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in _FILL:
            connection.execute(statement.format(**more).encode(), values)
        connection.execute("ANALYZE")


class LockWatch:
    """Asks PostgreSQL, every 50 ms, which sessions wait for a lock and since when.

    Only the waits of `application` count. It sees no wait that is shorter than its interval.
    """

    _LONGEST: Final = """
        SELECT coalesce(extract(epoch FROM max(clock_timestamp() - waitstart)), 0)
        FROM pg_locks JOIN pg_stat_activity USING (pid)
        WHERE NOT granted AND application_name = %s
    """

    def __init__(self, url: str, application: str) -> None:
        self._url = url
        self._application = application
        self.longest_s = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch in a thread of its own until the end of the context."""
        over = Event()
        with ThreadPoolExecutor(1) as pool:
            watch = pool.submit(self._watch, over)
            try:
                yield
            finally:
                over.set()
            watch.result()

    def _watch(self, over: Event) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            while not over.wait(_WATCH_S):
                row = connection.execute(self._LONGEST, [self._application]).fetchone()
                self.longest_s = max(self.longest_s, float(row[0]) if row else 0.0)


class Writers:
    """Sessions that write as the services do and measure how long each statement takes."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = Event()
        self.statements = 0
        # Statements that waited for a lock for longer than LONGEST_WAIT_MS.
        self.refused = 0
        self.longest_s = 0.0

    def run_beside(self, work: Callable[[], object]) -> None:
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
        with psycopg.connect(
            self._url,
            autocommit=True,
            options=f"-c lock_timeout={LONGEST_WAIT_MS}",
            application_name=WRITER,
        ) as connection:
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


def measure(url: str, rows: int, revision: str, say: Callable[[str], None]) -> dict[str, float]:
    """Fill an empty database at a revision, migrate it under load, and return the figures."""
    migrate(url, revision=revision)
    begun = time.perf_counter()
    fill(url, rows, batches=_BATCHES, keyed=revision >= _KEYED)
    say(f"{rows} rows at revision {revision} after {time.perf_counter() - begun:.0f} s")
    figures: dict[str, float] = {"rows": rows}
    for name, folder in (("release", None), ("next_release", _NEXT)):
        writers, watch = Writers(url), LockWatch(url, WRITER)
        begun = time.perf_counter()
        with watch.watching():
            writers.run_beside(partial(migrate, url, say=say, more_versions=folder))
        figures |= {
            f"{name}_migration_s": time.perf_counter() - begun,
            f"{name}_statements_meanwhile": writers.statements,
            f"{name}_longest_statement_ms": writers.longest_s * 1000,
            f"{name}_longest_lock_wait_seen_ms": watch.longest_s * 1000,
            f"{name}_lock_waits_over_1_s": writers.refused,
        }
    return figures


async def _run(rows: int, revision: str) -> dict[str, float]:
    started = time.monotonic()

    def say(line: str) -> None:
        Console(stderr=True).print(f"{time.monotonic() - started:7.1f} s  {line}", highlight=False)

    with tempfile.TemporaryDirectory(prefix="outbox-bench-") as name:
        async with Servers(Path(name), inbox=False) as servers:
            return await asyncio.to_thread(measure, servers.database_url, rows, revision, say)


def main(arguments: list[str]) -> int:
    """Measure and print; return 1 if a writer waited for a lock for longer than a second."""
    parser = argparse.ArgumentParser(prog="python -m bench.migration", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="at least 200000")
    parser.add_argument("--revision", default=[*released_revisions().values()][-1])
    given = parser.parse_args(arguments)
    figures: dict[str, Any] = asyncio.run(_run(given.rows, given.revision))
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.1f}")
    Console().print(table)
    refused = [value for name, value in figures.items() if name.endswith("_over_1_s")]
    return 1 if any(refused) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
