"""The plans of the dispatcher's statements use only indexes, however many attempts exist."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.storage import AccountRefusal
from outbox_server.services.dispatcher.storage.marking import MARK
from outbox_server.services.dispatcher.storage.settling import SETTLE
from outbox_server.services.dispatcher.storage.turning import TURN
from outbox_server.services.dispatcher.storage.upcoming import FIND
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.database.frequent import FrequentStatement
from outbox_server.shared.heads.concerned import Walk
from outbox_server.shared.heads.statements import HEADS_STATEMENT
from outbox_server.shared.mail.content import READ_BATCHES
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.settings import load_settings
from tests.conftest import Stores
from tests.dispatchers import options, settings_of
from tests.filled_databases import Statistics, filled_databases
from tests.marked_jobs import mark_refs
from tests.world import World

ATTEMPTS = 200_000
JOBS = 20_000
SENDERS = 20
SECOND = timedelta(seconds=1)
# A day in which only the last attempt of a sender was not refused: the longest search for a send.
_FILL = """
INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome, counted,
                      reply_class)
SELECT n, 1, n % {senders} + 1, now() - n * interval '400 ms', now() - n * interval '400 ms', 3,
       true, CASE WHEN n % 3 = 0 THEN 11 END
FROM generate_series(1, {attempts}) AS n;
INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient, state, attempt,
                        lease_until, finished_at)
SELECT 1, n % {senders} + 1, now(), n, 'r@y.test', CASE WHEN n % 100 = 0 THEN 2 ELSE 3 END, 1,
       CASE WHEN n % 100 = 0 THEN now() END, CASE WHEN n % 100 <> 0 THEN now() END
FROM generate_series(1, {jobs}) AS n;
INSERT INTO cooldowns (sender_id, since, next_probe_at, message)
SELECT n, now(), now(), 'no' FROM generate_series(1, {senders}) AS n;
"""


@pytest.fixture(scope="module")
def databases(stores: Stores) -> Iterator[Mapping[Statistics, str]]:
    """The URLs of databases with many attempts, by PostgreSQL's statistics of them."""
    fill = _FILL.format(attempts=ATTEMPTS, jobs=JOBS, senders=SENDERS).split(";\n")
    tables = ("attempts", "email_jobs", "cooldowns")
    with filled_databases(stores, "outbox_plans", fill, tables) as names:
        yield {each: stores.postgres.url(name) for each, name in names.items()}


@asynccontextmanager
async def connected(url: str, *, free: bool) -> AsyncIterator[AsyncEngine]:
    """Yield an engine on a database that is only read. `free`: PostgreSQL may choose any plan."""
    engine = create_engine(load_settings(database_url=url), lookups_only=not free)
    try:
        yield engine
    finally:
        await engine.dispose()


async def plans_of(
    engine: AsyncEngine, call: Callable[[AsyncConnection], Awaitable[Any]]
) -> list[str]:
    """Return the plan of each statement that `call` executes."""
    ran: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        ran.append((statement, parameters))

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    async with engine.connect() as connection:
        await call(connection)
        await connection.rollback()
        event.remove(engine.sync_engine, "before_cursor_execute", note)
        plans = [
            await connection.exec_driver_sql("EXPLAIN " + statement, parameters)
            for statement, parameters in ran
        ]
        return ["\n".join(plan.scalars()) for plan in plans]


def refusal(*, daily: bool) -> AccountRefusal:
    return AccountRefusal(7, 2 * SECOND, SECOND, "no", daily=daily)


CALLS: dict[str, Callable[[AsyncConnection], Awaitable[Any]]] = {
    "cool_down": lambda c: storage.cool_down(
        c, refusal(daily=False), backoff=(60 * SECOND,), day=timedelta(days=1)
    ),
    "cool_down by a daily quota": lambda c: storage.cool_down(
        c, refusal(daily=True), backoff=(60 * SECOND,), day=timedelta(days=1)
    ),
    "refused_in_a_row": lambda c: storage.refused_in_a_row(c, 7, 10),
    "end_cooldowns": lambda c: storage.end_cooldowns(c, [7]),
    "renew_leases": lambda c: storage.renew_leases(
        c, [JobRef(job, 1) for job in range(100, 5_100, 100)], 60 * SECOND
    ),
    "walk": lambda c: Walk().read(c, after=0, most=250),
    "walk over a shard": lambda c: Walk(shards=3, shard=1).read(c, after=0, most=250),
    "heads": lambda c: c.execute(HEADS_STATEMENT, {"senders": [7]}),
}


@pytest.mark.parametrize(
    ("statistics", "free"),
    [(Statistics.CURRENT, True), (Statistics.CURRENT, False), (Statistics.NONE, False)],
    ids=["any plan", "as the dispatcher", "as the dispatcher, just filled"],
)
async def test_no_statement_reads_more_jobs_and_attempts_than_it_needs(
    databases: Mapping[Statistics, str], statistics: Statistics, free: bool
) -> None:
    async with connected(databases[statistics], free=free) as engine:
        plans = {name: await plans_of(engine, call) for name, call in CALLS.items()}
    for name, found in plans.items():
        assert found, name
        plan = "\n".join(found)
        assert "Seq Scan on attempts" not in plan, f"{name}\n{plan}"
        assert "Seq Scan on email_jobs" not in plan, f"{name}\n{plan}"
    # The rows are read in the order of the index, so that the search ends at the first match.
    for name in ("cool_down by a daily quota", "refused_in_a_row"):
        plan = "\n".join(plans[name])
        assert "ix_attempts_history" in plan, f"{name}\n{plan}"
        assert free or "Bitmap" not in plan, f"{name}\n{plan}"


@pytest.mark.parametrize("statistics", [Statistics.CURRENT, Statistics.NONE])
async def test_the_plans_that_marks_and_settlements_keep_use_only_indexes(
    databases: Mapping[Statistics, str], statistics: Statistics
) -> None:
    async with connected(databases[statistics], free=False) as engine:
        for statement in (MARK, SETTLE, TURN, FIND):
            plan = await kept_plan(engine, statement)
            for table in ("email_jobs", "attempts", "batches", "senders", "suppressions"):
                assert f"Seq Scan on {table}" not in plan, plan
            # By the primary key alone: an index of a state may have most jobs of a backlog.
            assert "using pk_email_jobs" in plan, plan
            assert "ix_email_jobs" not in plan, plan
        assert "Seq Scan" not in await kept_plan(engine, READ_BATCHES)


async def kept_plan(engine: AsyncEngine, statement: FrequentStatement) -> str:
    """Return the plan of a prepared statement that does not depend on the parameters."""
    async with engine.connect() as connection:
        await connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")
        await connection.exec_driver_sql(f"PREPARE kept AS {statement.text}".replace("%", "%%"))
        nulls = ", ".join(["NULL"] * len(statement.names))
        plan = await connection.exec_driver_sql(f"EXPLAIN EXECUTE kept({nulls})")
        found = "\n".join(plan.scalars())
        await connection.exec_driver_sql("DEALLOCATE kept")
        return found


async def test_a_mark_reads_its_jobs_only_although_all_jobs_were_finished_before(
    new_database: Callable[[], str], redis_url: str
) -> None:
    settings = settings_of(options(new_database(), redis_url, "smtp://127.0.0.1:1"))
    async with World(settings) as world:
        # The statistics contain no waiting job, as in a quiet hour before a large batch.
        await world.schedule(await world.sender(), 3_000, load=False)
        await world.sql("UPDATE email_jobs SET state = 3, finished_at = now()")
        await world.sql("VACUUM ANALYZE")
        jobs = await world.schedule(await world.sender(), 3_000, load=False)
        engine = create_engine(settings, lookups_only=True, single_statements=True)
        claims = [JobRef(job, 1) for job in jobs[:20]]
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="READ COMMITTED")
            read = text(
                "SELECT sum(idx_tup_fetch + seq_tup_read) FROM pg_stat_xact_user_tables"
                " WHERE relname = 'email_jobs'"
            )
            assert len(await mark_refs(connection, claims, 60 * SECOND)) == 20
            assert (await connection.execute(read)).scalar_one() < 200
            await connection.rollback()
        await engine.dispose()


async def test_a_walk_over_senders_reads_few_rows_of_each_however_many_jobs_wait(
    new_database: Callable[[], str], redis_url: str
) -> None:
    settings = settings_of(options(new_database(), redis_url, "smtp://127.0.0.1:1"))
    async with World(settings) as world:
        senders = [await world.sender() for _ in range(10)]
        for sender in senders:
            await world.schedule(sender, 500, load=False)
        engine = create_engine(settings, lookups_only=True)
        async with engine.connect() as connection:
            read = text(
                "SELECT sum(idx_tup_fetch + seq_tup_read) FROM pg_stat_xact_user_tables"
                " WHERE relname = 'email_jobs'"
            )
            found = await Walk().read(connection, after=0, most=250)
            assert [one.sender_id for one in found] == senders
            assert (await connection.execute(read)).scalar_one() < 50
        await engine.dispose()
