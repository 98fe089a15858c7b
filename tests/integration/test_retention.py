"""Retention on a real PostgreSQL: random histories, before and after a removal."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from psycopg.rows import tuple_row
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.scheduler.storage import job_set_rows
from outbox_server.services.scheduler.storage.job_sets import ChangedJobs, change_part
from outbox_server.shared.audit.recount import stats_mismatch
from outbox_server.shared.audit.storage import count_missing, read_totals
from outbox_server.shared.database.counts import batch_counts, sender_counts
from outbox_server.shared.database.engine import create_engine, snapshot
from outbox_server.shared.heads.statements import HISTORY_STATEMENT
from outbox_server.shared.retention import storage
from outbox_server.shared.retention.purging import PurgedRows, Purger, RemovalBusy
from outbox_server.shared.retention.storage import OldRows, RemovedJobs
from outbox_server.shared.settings import load_settings
from outbox_server.shared.states import FINAL_STATES, PURGEABLE, AttemptOutcome, JobState
from tests import retrying
from tests.eventually import eventually
from tests.retrying import retry_failed
from tests.stats_stack import stats_server

T = TypeVar("T")
# Half an hour more than whole hours, so that no age equals the limit.
MINUTES = 30
# The fold of the stats service, but without the deltas of some batches.
FOLD = """
WITH moved AS (DELETE FROM count_deltas WHERE batch_id <> ALL(%s) RETURNING *),
by_sender AS (INSERT INTO sender_counts SELECT sender_id, state, sum(n) FROM moved GROUP BY 1, 2),
by_batch AS (INSERT INTO batch_counts SELECT batch_id, state, sum(n) FROM moved GROUP BY 1, 2)
INSERT INTO sender_hour_counts
SELECT sender_id, hour, state, sum(n) FROM moved WHERE state <> 1 GROUP BY 1, 2, 3
"""
_request_ids = itertools.count(1)


@dataclass(frozen=True)
class PastJob:
    """A job of a history. Ages are in hours; the age of its end applies only to final states."""

    state: JobState
    ended: int
    # The age of the end of each attempt.
    attempts: tuple[int, ...] = ()


@dataclass(frozen=True)
class PastBatch:
    """A batch of a history. `sweeping`: it is cancelled, but its rows are not updated yet."""

    accepted: int
    jobs: tuple[PastJob, ...]
    folded: bool = True
    sweeping: bool = False
    rejections: int = 0


ages = st.integers(0, 100)
jobs = st.builds(PastJob, st.sampled_from(JobState), ages, st.lists(ages, max_size=3).map(tuple))
batches = st.builds(
    PastBatch,
    ages,
    st.lists(jobs, max_size=8).map(tuple),
    folded=st.sampled_from([True, True, True, False]),
    sweeping=st.sampled_from([False, False, False, True]),
    rejections=st.integers(0, 3),
)

# Each of these differs in one point from a batch that is removed.
_GONE = PastJob(JobState.SENT, 100, (100,))
ALWAYS = (
    PastBatch(100, (_GONE,)),
    PastBatch(100, (_GONE,), folded=False),
    PastBatch(100, (_GONE,), sweeping=True),
    PastBatch(100, (_GONE, PastJob(JobState.UNCERTAIN, 100, (100,)))),
    PastBatch(100, (_GONE, PastJob(JobState.CANCELLED, 100, (0,)))),
)


@dataclass
class PastInstallation:
    """The rows of a history, and the expected result of a removal."""

    url: str
    ids: dict[int, PastJob] = field(default_factory=dict)
    batches: dict[int, PastBatch] = field(default_factory=dict)
    jobs_of: dict[int, list[int]] = field(default_factory=dict)
    senders: list[int] = field(default_factory=list)

    def write(self, history: list[PastBatch]) -> None:
        with psycopg.connect(self.url, row_factory=tuple_row) as connection:
            connection.execute(
                "DELETE FROM attempts; DELETE FROM email_jobs; DELETE FROM batch_rejections;"
                "DELETE FROM batches; DELETE FROM batch_cancellations; DELETE FROM senders;"
                "DELETE FROM count_deltas; DELETE FROM batch_counts; DELETE FROM sender_counts;"
                "DELETE FROM sender_hour_counts; DELETE FROM purged_counts"
            )
            for name in ("one", "two"):
                row = connection.execute(
                    "INSERT INTO senders (user_id, email, hourly_limit) VALUES ('ann', %s, 100)"
                    " RETURNING id",
                    (f"{name}@x.test",),
                ).fetchone()
                assert row
                self.senders.append(row[0])
            # Ids are in the order of acceptance.
            for batch in sorted(history, key=lambda batch: -batch.accepted):
                self._write_batch(connection, batch)
            connection.execute(FOLD, (self.unfolded(),))

    def unfolded(self) -> list[int]:
        return [key for key, batch in self.batches.items() if not batch.folded]

    def _write_batch(self, connection: psycopg.Connection[Any], batch: PastBatch) -> None:
        number = next(_request_ids)
        sender = self.senders[number % 2]
        row = connection.execute(
            "INSERT INTO batches (user_id, sender_id, request_id, request_hash, start_at,"
            " duplicates, mode, accepted_count, created_at, state) VALUES ('ann', %s, %s, '',"
            " now(), 1, 1, %s, now() - %s * interval '1 hour', %s) RETURNING id",
            (sender, f"r{number}", len(batch.jobs), batch.accepted, 1 + batch.sweeping),
        ).fetchone()
        assert row
        batch_id = row[0]
        self.batches[batch_id] = batch
        if batch.sweeping:
            connection.execute(
                "INSERT INTO batch_cancellations VALUES (%s, %s, now() - interval '99 hours', 0)",
                (batch_id, sender),
            )
        for line in range(batch.rejections):
            connection.execute(
                "INSERT INTO batch_rejections VALUES (%s, %s, '', 'EMAIL_MISSING', 'no address')",
                (batch_id, line + 1),
            )
        for job in batch.jobs:
            final = job.state in FINAL_STATES
            row = connection.execute(
                "WITH job AS (INSERT INTO email_jobs (batch_id, sender_id, scheduled_at,"
                " row_number, recipient, state, attempt, finished_at, lease_until)"
                " VALUES (%(batch)s, %(sender)s, now(), 1, 'r@y.test', %(state)s, %(attempts)s,"
                " now() - %(ended)s * interval '1 hour',"
                " CASE WHEN %(state)s = 2 THEN now() + interval '1 hour' END) RETURNING *)"
                " INSERT INTO count_deltas (sender_id, batch_id, hour, state, n) SELECT sender_id,"
                " batch_id, date_trunc('hour', coalesce(finished_at, now()), 'UTC'),"
                " CASE state WHEN 2 THEN 1 ELSE state END, 1 FROM job"
                " RETURNING (SELECT id FROM job)",
                {
                    "batch": batch_id,
                    "sender": sender,
                    "state": int(job.state),
                    "attempts": len(job.attempts),
                    "ended": job.ended if final else None,
                },
            ).fetchone()
            assert row
            self.ids[row[0]] = job
            self.jobs_of.setdefault(batch_id, []).append(row[0])
            for place, age in enumerate(job.attempts, start=1):
                connection.execute(
                    "INSERT INTO attempts VALUES (%s, %s, %s, now() - (%s + 1) * interval '1 hour',"
                    " now() - %s * interval '1 hour', %s, true)",
                    (row[0], place, sender, age, age, int(AttemptOutcome.SENT)),
                )

    def may_go(self, job: PastJob, hours: int) -> bool:
        """Return whether a job is finished and both its end and its attempts are old."""
        return job.state in PURGEABLE and all(age > hours for age in (job.ended, *job.attempts))

    def expected_jobs(self, hours: int) -> set[int]:
        return {job_id for job_id, job in self.ids.items() if not self.may_go(job, hours)}

    def expected_batches(self, hours: int) -> set[int]:
        return {
            batch_id
            for batch_id, batch in self.batches.items()
            if batch.accepted <= hours
            or batch.sweeping
            or (not batch.folded and batch.jobs)
            or any(not self.may_go(job, hours) for job in batch.jobs)
        }

    def column(self, statement: str) -> list[Any]:
        with psycopg.connect(self.url, row_factory=tuple_row) as connection:
            return [row[0] for row in connection.execute(statement.encode()).fetchall()]


async def _on(url: str, work: Callable[[AsyncEngine], Awaitable[T]]) -> T:
    engine = create_engine(load_settings(database_url=url), lookups_only=True)
    try:
        return await work(engine)
    finally:
        await engine.dispose()


@dataclass(frozen=True)
class Reading:
    """The data that callers, the limiter and the audit read."""

    by_sender: Any
    by_batch: Any
    history: set[tuple[Any, ...]]
    # Counts that differ from a recount, and jobs without a row: in total and per sender.
    mismatch: int
    missing: list[int]


async def _read(engine: AsyncEngine, installation: PastInstallation, reach: timedelta) -> Reading:
    async with snapshot(engine) as connection:
        rows = await connection.execute(
            HISTORY_STATEMENT, {"senders": installation.senders, "reach": reach}
        )
        history = {
            (row.sender_id, row.leased, job, attempt)
            for row in rows
            for job, attempt in zip(row.email_job_id, row.attempt, strict=True)
        }
        there = installation.column("SELECT id FROM batches")
        missing = [await count_missing(connection, sender) for sender in installation.senders]
        return Reading(
            await sender_counts(connection, installation.senders),
            await batch_counts(connection, there),
            history,
            await stats_mismatch(connection),
            [(await read_totals(connection)).missing, *missing],
        )


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One loop for all examples, so that they share the connections of an engine."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        yield runner


@settings(
    max_examples=5,
    # Shrinking an example takes minutes.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    history=st.lists(batches, min_size=2, max_size=8).map(lambda some: [*ALWAYS, *some]),
    hours=st.integers(0, 99),
    chunk=st.integers(1, 7),
)
def test_only_old_finished_jobs_are_removed_and_no_reader_notices(
    database_url: str, runner: asyncio.Runner, history: list[PastBatch], hours: int, chunk: int
) -> None:
    installation = PastInstallation(database_url)
    installation.write(history)
    age = timedelta(hours=hours, minutes=MINUTES)

    async def purge(engine: AsyncEngine) -> tuple[Reading, list[OldRows], PurgedRows, Reading]:
        before = await _read(engine, installation, age)
        async with engine.connect() as connection:
            counted = await storage.count_old(connection, age)
        removed = await Purger(engine, age, chunk=chunk).purge_once()
        return before, counted, removed, await _read(engine, installation, age)

    before, counted, removed, after = runner.run(_on(database_url, purge))

    jobs_left = set(installation.column("SELECT id FROM email_jobs"))
    assert jobs_left == installation.expected_jobs(hours)
    # Attempts are removed with their jobs.
    attempts = set(installation.column("SELECT email_job_id FROM attempts"))
    assert attempts == {job_id for job_id in jobs_left if installation.ids[job_id].attempts}
    batches_left = set(installation.column("SELECT id FROM batches"))
    assert batches_left == installation.expected_batches(hours)
    # No row of a removed batch remains.
    for table in ("batch_rejections", "batch_counts", "email_jobs", "purged_counts"):
        named = set(installation.column(f"SELECT batch_id FROM {table}"))
        assert named <= batches_left | ({0} if table == "purged_counts" else set()), table
    assert removed.jobs == len(installation.ids) - len(jobs_left)
    assert removed.batches == len(installation.batches) - len(batches_left)
    for name in ("jobs", "attempts", "batches", "rejections"):
        assert sum(getattr(row, name) for row in counted) == getattr(removed, name), name

    # The limiter's history and every count are unchanged.
    assert after.history == before.history
    assert after.by_sender == before.by_sender
    assert after.by_batch == {key: before.by_batch[key] for key in batches_left}
    assert (before.mismatch, after.mismatch) == (0, 0)
    assert after.missing == before.missing == [0, 0, 0]


OLD_FAILURES = PastBatch(90, tuple(PastJob(JobState.FAILED, 80, (80,)) for _ in range(300)))


async def test_jobs_that_are_retried_during_a_removal_are_not_lost(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_set_rows, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(job_set_rows, "BLOCK_JOBS", 1)
    installation = PastInstallation(database_url)
    await asyncio.to_thread(installation.write, [OLD_FAILURES])
    (batch_id,) = installation.batches

    # The first part of each comes before the second part of the other.
    removed_part, retried_part = asyncio.Event(), asyncio.Event()
    remove_jobs = storage.remove_jobs

    async def remove(*arguments: Any) -> RemovedJobs:
        if removed_part.is_set():
            await retried_part.wait()
        return await remove_jobs(*arguments)

    async def change(*arguments: Any, **more: Any) -> ChangedJobs:
        done = await change_part(*arguments, **more)
        if done.jobs:
            retried_part.set()
        return done

    monkeypatch.setattr(storage, "remove_jobs", remove)
    monkeypatch.setattr(retrying, "change_part", change)

    async def work(engine: AsyncEngine) -> tuple[int, int]:
        purger = Purger(engine, timedelta(hours=24), chunk=10, report=lambda _: removed_part.set())
        async with asyncio.TaskGroup() as group:
            removing = group.create_task(purger.purge_once())
            await removed_part.wait()
            retries = group.create_task(retry_failed(engine, "batch_id", batch_id))
        return removing.result().jobs, retries.result()

    removed, retried = await _on(database_url, work)
    assert removed + retried == 300
    assert min(removed, retried) > 0
    states = installation.column("SELECT state FROM email_jobs")
    assert states == [JobState.SCHEDULED] * retried
    reading = await _on(
        database_url, lambda engine: _read(engine, installation, timedelta(hours=1))
    )
    assert (reading.mismatch, reading.missing) == (0, [0, 0, 0])
    assert reading.by_batch[batch_id].scheduled == retried
    assert reading.by_batch[batch_id].failed == removed


async def test_one_process_removes_at_a_time(database_url: str) -> None:
    installation = PastInstallation(database_url)
    await asyncio.to_thread(installation.write, [OLD_FAILURES])

    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as other:
            assert await storage.enter(other)
            with pytest.raises(RemovalBusy):
                await Purger(engine, timedelta(hours=24)).purge_once()
        assert (await Purger(engine, timedelta(hours=24)).purge_once()).jobs == 300

    await _on(database_url, work)


async def test_the_statements_use_their_indexes(database_url: str) -> None:
    installation = PastInstallation(database_url)
    await asyncio.to_thread(
        installation.write, [OLD_FAILURES, PastBatch(3, OLD_FAILURES.jobs[:1] * 20)]
    )
    with psycopg.connect(database_url, autocommit=True, row_factory=tuple_row) as connection:
        statistics = "SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE relname = ANY(%s)"
        large = ["email_jobs", "attempts", "batches", "batch_rejections"]

        async def purge(engine: AsyncEngine) -> None:
            await Purger(engine, timedelta(hours=24), chunk=50).purge_once()

        def read() -> Any:
            connection.execute("SELECT pg_stat_force_next_flush(), pg_stat_clear_snapshot()")
            return connection.execute(statistics, (large,)).fetchall()

        before = read()
        await _on(database_url, purge)
        assert installation.column("SELECT count(*) FROM email_jobs") == [0]
        assert read() == before


async def test_the_stats_service_removes_old_jobs(database_url: str, redis_url: str) -> None:
    installation = PastInstallation(database_url)
    young = PastBatch(3, (PastJob(JobState.SENT, 2, (2,)),))
    await asyncio.to_thread(installation.write, [OLD_FAILURES, young])
    async with stats_server(database_url, redis_url, retention="1d"):

        async def removed() -> bool:
            return len(installation.column("SELECT id FROM batches")) == 1

        await eventually(removed)
    assert len(installation.column("SELECT id FROM email_jobs")) == 1


async def test_without_retention_the_stats_service_removes_nothing(
    database_url: str, redis_url: str
) -> None:
    installation = PastInstallation(database_url)
    await asyncio.to_thread(installation.write, [OLD_FAILURES])
    async with stats_server(database_url, redis_url):
        pass
    assert len(installation.column("SELECT id FROM email_jobs")) == 300
