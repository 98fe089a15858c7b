"""Counts compared with a recount of the rows, on a real PostgreSQL, under concurrent changes."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.stats import storage
from outbox_server.shared.database.counts import JobCounts, batch_counts, sender_counts, user_counts
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.settings import load_settings
from outbox_server.shared.states import FINAL_STATES, JobState
from tests.eventually import PATIENCE, eventually

WINDOW = timedelta(hours=1)
HOUR = timedelta(hours=1)

# The changes of the other services; claims and retries write no delta.
INTAKE = """
WITH jobs AS (
    INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient)
    SELECT %(batch)s, %(sender)s, now() + number * interval '1 second', number, 'a@x.test'
    FROM generate_series(1, %(n)s) AS number
)
INSERT INTO count_deltas (sender_id, batch_id, hour, state, n)
VALUES (%(sender)s, %(batch)s, date_trunc('hour', now()), 1, %(n)s)
"""
# Of a subquery alone, a plan may read the rows again and again, and take more than its limit.
CLAIM = """
WITH taken AS MATERIALIZED (
    SELECT id FROM email_jobs WHERE state = 1 ORDER BY random() LIMIT %(n)s FOR UPDATE SKIP LOCKED
)
UPDATE email_jobs SET state = 2, attempt = attempt + 1, lease_until = now() + interval '1 minute'
WHERE id IN (SELECT id FROM taken)
"""
RETRY = """
WITH taken AS MATERIALIZED (
    SELECT id FROM email_jobs WHERE state = 2 ORDER BY random() LIMIT %(n)s FOR UPDATE SKIP LOCKED
)
UPDATE email_jobs SET state = 1, lease_until = NULL
WHERE id IN (SELECT id FROM taken)
"""
# A settlement (from SENDING) or a cancel (from SCHEDULED), at some time of the last 30 hours.
END = """
WITH taken AS MATERIALIZED (
    SELECT id FROM email_jobs WHERE state = %(before)s ORDER BY random() LIMIT %(n)s
    FOR UPDATE SKIP LOCKED
), ended AS (
    UPDATE email_jobs SET state = %(state)s, lease_until = NULL,
        finished_at = now() - random() * interval '30 hours'
    WHERE id IN (SELECT id FROM taken)
    RETURNING sender_id, batch_id, date_trunc('hour', finished_at) AS hour
), sums AS (
    SELECT sender_id, batch_id, hour, count(*) AS n FROM ended GROUP BY 1, 2, 3
)
INSERT INTO count_deltas (sender_id, batch_id, hour, state, n)
SELECT sender_id, batch_id, hour, 1, -n FROM sums
UNION ALL SELECT sender_id, batch_id, hour, %(state)s, n FROM sums
"""
WAITING_ENDS = (JobState.CANCELLED, JobState.SUPPRESSED, JobState.EXPIRED)


@dataclass(frozen=True)
class CountedWorld:
    """Two users, three senders, two batches per sender."""

    url: str
    engine: AsyncEngine
    owner: dict[int, str]
    batches: dict[int, int]

    async def connect(self) -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(
            self.url, autocommit=True, options="-c timezone=UTC"
        )

    async def do(self, *statements: str, **values: Any) -> None:
        async with await self.connect() as connection, connection.transaction():
            for statement in statements:
                await connection.execute(statement, values)

    async def intake(self, batch: int, n: int) -> None:
        await self.do(INTAKE, batch=batch, sender=self.batches[batch], n=n)

    async def unfolded(self) -> int:
        async with self.engine.connect() as connection:
            return await scalar(connection, "SELECT count(*) FROM count_deltas")

    async def fold_all(self) -> None:
        while await storage.fold_once(self.engine):
            pass

    async def check(self) -> JobCounts:
        """Compare every count with a recount at the same moment; return the counts of `anna`."""
        async with storage.snapshot(self.engine) as connection:
            by_sender = await sender_counts(connection, self.owner)
            assert by_sender == await recount(connection, "sender_id", self.owner)
            by_batch = await batch_counts(connection, self.batches)
            assert by_batch == await recount(connection, "batch_id", self.batches)
            for sender in self.owner:
                await check_hours(connection, sender)
            users = {user: await user_counts(connection, user) for user in ("anna", "bert")}
        for user, counts in users.items():
            for state in JobState:
                parts = [by_sender[sender] for sender, owner in self.owner.items() if owner == user]
                assert counts[state] == sum(part[state] for part in parts)
        return users["anna"]


async def scalar(connection: AsyncConnection, statement: str, **values: Any) -> int:
    number: int = (await connection.execute(text(statement), values)).scalar_one()
    return number


async def recount(connection: AsyncConnection, column: str, keys: Any) -> dict[int, JobCounts]:
    rows = await connection.execute(
        text(f"SELECT {column}, state, count(*) FROM email_jobs GROUP BY 1, 2")
    )
    found: dict[int, dict[str, int]] = {key: {} for key in keys}
    for key, state, n in rows:
        found[key][JobState(state).name.lower()] = n
    return {key: JobCounts(**counts) for key, counts in found.items()}


async def check_hours(connection: AsyncConnection, sender: int) -> None:
    stats = await storage.read_sender(connection, sender, None, WINDOW)
    assert stats is not None
    now = stats.read_at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    assert [hour.start for hour in stats.hours] == [now - n * HOUR for n in reversed(range(24))]
    rows = await connection.execute(
        text(
            "SELECT date_trunc('hour', finished_at), count(*) FILTER (WHERE state = 3),"
            " count(*) FILTER (WHERE state = 4) FROM email_jobs WHERE sender_id = :sender"
            " AND state IN (3, 4) AND finished_at >= :first GROUP BY 1"
        ),
        {"sender": sender, "first": stats.hours[0].start},
    )
    expected = {start: (sent, failed) for start, sent, failed in rows}
    found = {hour.start: (hour.sent, hour.failed) for hour in stats.hours}
    assert {start: both for start, both in found.items() if any(both)} == expected


@pytest_asyncio.fixture
async def world(database_url: str) -> AsyncIterator[CountedWorld]:
    engine = create_engine(load_settings(database_url=database_url))
    owner: dict[int, str] = {}
    batches: dict[int, int] = {}
    async with engine.begin() as connection:
        for user in ("anna", "anna", "bert"):
            sender = await scalar(
                connection,
                "INSERT INTO senders (user_id, email, hourly_limit)"
                " VALUES (:user, 'a@x.test', 100) RETURNING id",
                user=user,
            )
            owner[sender] = user
            for number in range(2):
                batch = await scalar(
                    connection,
                    "INSERT INTO batches (user_id, sender_id, request_id, request_hash, start_at,"
                    " duplicates, mode) VALUES (:user, :sender, :request, '', now(), 1, 1)"
                    " RETURNING id",
                    user=user,
                    sender=sender,
                    request=f"{sender}-{number}",
                )
                batches[batch] = sender
    yield CountedWorld(database_url, engine, owner, batches)
    await engine.dispose()


async def write(world: CountedWorld, seed: int, steps: int) -> None:
    """Take random steps; each is a transaction, and some run several transactions at once."""
    chance = random.Random(seed)
    async with await world.connect() as connection:
        for _ in range(steps):
            async with connection.transaction():
                for _ in range(chance.randint(1, 2)):
                    n = chance.randint(1, 9)
                    match chance.choice(("intake", "claim", "claim", "retry", "end", "end", "cut")):
                        case "intake":
                            batch, sender = chance.choice(list(world.batches.items()))
                            values = {"batch": batch, "sender": sender, "n": 2 * n}
                            await connection.execute(INTAKE, values)
                        case "claim":
                            await connection.execute(CLAIM, {"n": n})
                        case "retry":
                            await connection.execute(RETRY, {"n": n // 3})
                        case "end":
                            state = chance.choice((3, 3, 3, 4, 5))
                            await connection.execute(END, {"before": 2, "state": state, "n": n})
                        case _:
                            state = int(chance.choice(WAITING_ENDS))
                            await connection.execute(
                                END, {"before": 1, "state": state, "n": n // 3}
                            )


async def test_counts_equal_a_recount_at_any_moment(world: CountedWorld) -> None:
    writing = True
    checks = 0

    async def fold(limit: int) -> int:
        folded = 0
        while writing:
            async with world.engine.begin() as connection:
                folded += await storage.fold(connection, limit)
        return folded

    async def check() -> None:
        nonlocal checks
        while writing:
            await world.check()
            checks += 1

    async with asyncio.TaskGroup() as group:
        folds = [group.create_task(fold(limit)) for limit in (3, 1000)]
        group.create_task(check())
        writers = [group.create_task(write(world, seed, 80)) for seed in range(4)]
        await asyncio.wait(writers)
        writing = False

    assert checks >= 5
    assert all(task.result() > 0 for task in folds)
    await world.check()
    await world.fold_all()
    assert await world.unfolded() == 0
    counts = await world.check()
    assert counts.total
    assert all(counts[state] for state in FINAL_STATES), "the test reaches every state"


async def test_scheduled_and_sending_are_counted_separately_without_a_delta(
    world: CountedWorld,
) -> None:
    batch = next(iter(world.batches))
    await world.intake(batch, 10)
    await world.fold_all()
    await world.do(CLAIM, n=4)
    assert await world.check() == JobCounts(scheduled=6, sending=4)
    await world.do(RETRY, n=1)
    counts = await world.check()
    assert counts == JobCounts(scheduled=7, sending=3)
    assert (counts.open, counts.total, counts[JobState.SENDING]) == (10, 10, 3)
    assert await world.unfolded() == 0


async def test_batches_and_senders_without_jobs_count_zero(world: CountedWorld) -> None:
    async with world.engine.connect() as connection:
        assert await batch_counts(connection, [987654321]) == {987654321: JobCounts()}
        assert await sender_counts(connection, []) == {}
        assert await user_counts(connection, "nobody") == JobCounts()


async def test_a_fold_is_invisible_before_its_commit(world: CountedWorld) -> None:
    batch = next(iter(world.batches))
    await world.intake(batch, 10)
    async with world.engine.begin() as connection:
        assert await storage.fold(connection) == 1
        assert await world.unfolded() == 1
        assert await world.check() == JobCounts(scheduled=10)
    assert await world.unfolded() == 0
    assert await world.check() == JobCounts(scheduled=10)


async def test_a_fold_takes_no_more_deltas_than_its_limit_and_the_oldest_first(
    world: CountedWorld,
) -> None:
    first, second, *_ = world.batches
    await world.intake(first, 1)
    await world.intake(second, 2)
    async with world.engine.begin() as connection:
        assert await storage.fold(connection, 1) == 1
        folded = await connection.execute(text("SELECT batch_id, n FROM batch_counts"))
        assert [tuple(row) for row in folded] == [(first, 1)]
        assert await storage.fold(connection, 5) == 1
        assert await storage.fold(connection, 5) == 0
    await world.check()


async def test_deltas_with_the_ids_of_folded_ones_are_counted_too(world: CountedWorld) -> None:
    """As after a failover to a replica that lagged, where the sequence has stepped back."""
    batch = next(iter(world.batches))
    await world.intake(batch, 10)
    await world.fold_all()
    async with world.engine.begin() as connection:
        await connection.execute(text("ALTER SEQUENCE count_deltas_id_seq RESTART"))
    await world.intake(batch, 5)
    assert await world.check() == JobCounts(scheduled=15)
    await world.fold_all()
    assert await world.check() == JobCounts(scheduled=15)


async def test_a_fold_skips_deltas_that_another_fold_has_locked(
    world: CountedWorld,
) -> None:
    first, *_, last = world.batches
    await world.intake(first, 10)
    await world.intake(last, 20)
    async with asyncio.timeout(PATIENCE), world.engine.begin() as one:
        assert await storage.fold(one, 1) == 1
        async with world.engine.begin() as other:
            assert await storage.fold(other, 5) == 1
        await world.check()
    await world.check()
    assert await world.unfolded() == 0


async def test_concurrent_folds_of_the_same_rows_do_not_deadlock(
    world: CountedWorld,
) -> None:
    chance = random.Random(7)
    async with await world.connect() as connection:
        for _ in range(1500):
            batch, sender = chance.choice(list(world.batches.items()))
            hour = datetime(2026, 1, 1, chance.randint(0, 23), tzinfo=UTC)
            await connection.execute(
                "INSERT INTO count_deltas (sender_id, batch_id, hour, state, n)"
                " VALUES (%s, %s, %s, %s, 1)",
                (sender, batch, hour, chance.choice([1, 3, 4, 6])),
            )

    async def fold() -> int:
        folded = 0
        while await world.unfolded():
            async with world.engine.begin() as connection:
                folded += await storage.fold(connection, 25)
        return folded

    async with asyncio.TaskGroup() as group:
        folds = [group.create_task(fold()) for _ in range(4)]
    assert sum(task.result() for task in folds) == 1500
    async with world.engine.connect() as reader:
        for table in ("sender_counts", "batch_counts"):
            assert await scalar(reader, f"SELECT sum(n)::bigint FROM {table}") == 1500


async def test_a_fold_whose_connection_is_cut_before_its_commit_changes_nothing(
    world: CountedWorld,
) -> None:
    batch = next(iter(world.batches))
    await world.intake(batch, 10)

    async def fold_and_be_cut() -> None:
        async with world.engine.begin() as connection:
            assert await storage.fold(connection) == 1
            pid = await scalar(connection, "SELECT pg_backend_pid()")
            await world.do("SELECT pg_terminate_backend(%(pid)s, 5000)", pid=pid)

    with pytest.raises(DBAPIError):
        await fold_and_be_cut()
    assert await world.unfolded() == 1
    assert await world.check() == JobCounts(scheduled=10)
    await world.fold_all()
    assert await world.check() == JobCounts(scheduled=10)


FOLDER = """
import asyncio, sys
from outbox_server.services.stats.storage import fold
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.settings import load_settings

async def main():
    engine = create_engine(load_settings(database_url=sys.argv[1]))
    while True:
        async with engine.begin() as connection:
            print(await fold(connection, 1), flush=True)
            sys.stdin.readline()

asyncio.run(main())
"""


@asynccontextmanager
async def folder_in_a_fold(
    world: CountedWorld, folds: int
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a process that has folded that many deltas one by one, and has begun to fold one more."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        FOLDER,
        world.url,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE):
            for _ in range(folds):
                assert await child.stdout.readline() == b"1\n"
                await world.check()
                child.stdin.write(b"\n")
            assert await child.stdout.readline() == b"1\n"
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def begin_and_end_some(world: CountedWorld) -> None:
    for batch in world.batches:
        await world.intake(batch, 5)
        await world.do(CLAIM, n=3)
        await world.do(END, before=2, state=3, n=3)


async def test_a_process_killed_during_a_fold_loses_and_doubles_nothing(
    world: CountedWorld,
) -> None:
    await begin_and_end_some(world)
    before = await world.unfolded()
    async with folder_in_a_fold(world, 3):
        pass
    assert await world.unfolded() == before - 3
    await world.check()
    async with asyncio.timeout(PATIENCE):
        await world.fold_all()
    assert await world.unfolded() == 0
    await world.check()


async def test_a_process_paused_during_a_fold_blocks_no_other_and_its_fold_counts_once(
    world: CountedWorld,
) -> None:
    await begin_and_end_some(world)
    async with folder_in_a_fold(world, 2) as child:
        child.send_signal(signal.SIGSTOP)
        await begin_and_end_some(world)
        async with asyncio.timeout(PATIENCE):
            # Another fold needs rows of a rollup that the paused process has changed, so it waits
            # for it. Counts are read meanwhile.
            other = asyncio.create_task(world.fold_all())
            await eventually(lambda: waits_for_a_lock(world))
            asleep = await world.check()
            await begin_and_end_some(world)
            assert await world.check() != asleep
            child.send_signal(signal.SIGCONT)
            # The paused process waits for nothing else.
            assert child.stdin is not None
            child.stdin.write_eof()
            await other
        await world.check()
    await world.fold_all()
    assert await world.unfolded() == 0
    await world.check()


async def waits_for_a_lock(world: CountedWorld) -> bool:
    async with world.engine.connect() as connection:
        return bool(
            await scalar(
                connection,
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'",
            )
        )


async def executed(
    connection: AsyncConnection, read: Callable[[AsyncConnection], Awaitable[object]]
) -> list[tuple[str, Any]]:
    """Return the statements that `read` executes, with their parameters."""
    found: list[tuple[str, Any]] = []

    def remember(_: object, __: object, statement: str, parameters: Any, *___: object) -> None:
        found.append((statement, parameters))

    assert connection.sync_connection is not None
    event.listen(connection.sync_connection, "before_cursor_execute", remember)
    await read(connection)
    event.remove(connection.sync_connection, "before_cursor_execute", remember)
    assert found
    return found


async def explain(connection: AsyncConnection, statement: str, parameters: Any) -> dict[str, Any]:
    """Execute a statement; return its plan, with the rows that each step of it read.

    The statistics of the table count other rows as well: the planner reads the ends of an index.
    """
    explained = await connection.exec_driver_sql(
        f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters
    )
    plan: dict[str, Any] = explained.scalar_one()[0]["Plan"]
    return plan


def jobs_of(plan: dict[str, Any]) -> int:
    """Return how many rows of `email_jobs` a plan read, also those that it left out."""
    read = 0.0
    if plan.get("Relation Name") == "email_jobs":
        removed = ("Rows Removed by Filter", "Rows Removed by Index Recheck")
        rows = plan["Actual Rows"] + sum(plan.get(name, 0) for name in removed)
        read = rows * plan["Actual Loops"]
    return round(read) + sum(map(jobs_of, plan.get("Plans", ())))


async def test_counts_read_no_jobs_except_those_in_sending(
    world: CountedWorld,
) -> None:
    batch, sender = next(iter(world.batches.items()))
    await world.intake(batch, 20_000)
    await world.do(CLAIM, n=5)
    await world.do("ANALYZE email_jobs")

    async def check(
        read: Callable[[AsyncConnection], Awaitable[object]], least: int, most: int
    ) -> None:
        async with storage.snapshot(world.engine) as connection:
            # A generic plan, as a prepared statement may get: it does not depend on the parameters.
            await connection.execute(text("SET LOCAL plan_cache_mode = force_generic_plan"))
            plans = [await explain(connection, *each) for each in await executed(connection, read)]
            assert least <= sum(map(jobs_of, plans)) <= most, json.dumps(plans)

    await check(lambda c: batch_counts(c, [batch]), 5, 5)
    await check(lambda c: sender_counts(c, [sender]), 5, 5)
    await check(lambda c: user_counts(c, "anna"), 5, 5)
    await check(lambda c: storage.read_sender(c, sender, None, WINDOW), 0, 20)
