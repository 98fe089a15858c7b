"""A list reads a bounded number of rows, whatever its filter, and however many jobs there are."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.storage.batches import list_batches
from outbox_server.services.scheduler.storage.bounded import MOST_READ
from outbox_server.services.scheduler.storage.erasing import (
    count_left,
    erase_cooldowns,
    erase_jobs,
    read_rejections,
    suppress_erased,
)
from outbox_server.services.scheduler.storage.job_filters import FoundJobs, JobFilter, JobPosition
from outbox_server.services.scheduler.storage.suppression_imports import suppress_all
from outbox_server.services.scheduler.storage.suppressions import insert_suppression
from outbox_server.services.scheduler.storage.users import list_users
from outbox_server.services.scheduler.storage.walking import ROWS_READ, walk_jobs
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.filters.fields import FieldTest, check_filter
from outbox_server.shared.filters.grammar import parse_filter
from outbox_server.shared.filters.resources import BATCH_FIELDS, JOB_FIELDS
from outbox_server.shared.intake.tags import external_key
from outbox_server.shared.settings import load_settings
from outbox_server.shared.user_quotas import UserQuotas
from tests.conftest import Stores
from tests.filled_databases import Statistics, filled_databases

QUOTAS: Final = UserQuotas.from_settings(load_settings())
# Of the user big: one large batch, half of it sent, and many small ones. Others have as many.
LARGE: Final = 40_000
SMALL: Final = 2_500
# The rows that a page may read: of jobs twice, of their batches, of other batches and of counts.
MOST: Final = 5 * ROWS_READ
_FILL: Final = f"""
INSERT INTO senders (user_id, email, hourly_limit)
SELECT CASE WHEN n <= 10 THEN 'big' ELSE 'u' || n END, 's@x.org', 9
FROM generate_series(1, 20) AS n;
INSERT INTO batches (user_id, sender_id, request_id, request_hash, start_at, duplicates, mode,
                     accepted_count, labels, row_labels)
SELECT s.user_id, s.id, n::text, '', now(), 1, 1, CASE n WHEN 1 THEN {LARGE} ELSE 10 END,
       CASE WHEN n % 7 = 0 THEN '{{"kind": "news"}}'::jsonb END, n % 500 = 1
FROM generate_series(1, {SMALL}) AS n JOIN senders AS s ON s.id = 1 + n % 20
ORDER BY n;
INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient, state, attempt,
                        finished_at, lease_until, external_id, external_key, labels)
SELECT b.id, b.sender_id, now() + n * interval '1 ms', n, 'r' || n || '@y.test', now_in, 1,
       CASE WHEN now_in > 2 THEN now() END, CASE now_in WHEN 2 THEN now() END,
       CASE WHEN b.id = 1 AND n > 9 THEN 'same' WHEN b.id = 1 THEN 'rare' END,
       CASE WHEN b.id = 1 AND n > 9 THEN {external_key("big", "same")}
            WHEN b.id = 1 THEN {external_key("big", "rare")} END,
       CASE WHEN b.row_labels AND n = 9 THEN '{{"kind": "rare"}}'::jsonb END
FROM batches AS b, generate_series(1, b.accepted_count) AS n,
     LATERAL (SELECT CASE WHEN b.id % 500 = 0 AND n = 3 OR n = 39999 THEN 4 WHEN n = 20001 THEN 2
                          WHEN n > 20001 OR b.id > {SMALL - 200} THEN 1 ELSE 3 END AS now_in) AS s;
INSERT INTO batch_counts (batch_id, state, n)
SELECT batch_id, CASE state WHEN 2 THEN 1 ELSE state END, count(*) FROM email_jobs GROUP BY 1, 2;
"""
LABELS: Final = " OR ".join(f"labels.k{n} = none" for n in range(12))
JOBS: Final = (
    "",
    "state = SENT",
    "state = SCHEDULED",
    "state = FAILED",
    "state = CANCELLED",
    "state = SENDING",
    "state = SCHEDULED AND sender_id = 2",
    "state = FAILED AND row_number > 30000",
    "row_number = 39000",
    "recipient = r7@y.test AND batch_id = 1",
    "recipient = r39000@y.test",
    "recipient != r1@y.test AND attempt_count > 1",
    "external_id = same",
    "external_id = same AND state = CANCELLED",
    "external_id = rare",
    "external_id = none OR labels.kind = none",
    "labels.kind = news",
    "labels.kind = rare",
    "labels.kind != news AND state = SENT",
    LABELS,
    "create_time > 2027-01-01T00:00:00Z",
    "create_time < 2026-01-01T00:00:00Z AND state = SENT",
    "finish_time < 2026-01-01T00:00:00Z OR schedule_time < 2026-01-01T00:00:00Z",
    "batch_id = 1 AND state = SCHEDULED",
    "sender_id = 3 AND NOT (state = SENT OR row_number < 5)",
)
BATCHES: Final = (
    "",
    "state = ACTIVE",
    "state = DONE",
    "state = CANCELLED",
    "sender_id = 3",
    "sender_id != 3",
    "request_id = '2480'",
    "rejected_count > 0",
    "external_id = none",
    "labels.kind = news",
    "create_time > 2027-01-01T00:00:00Z",
)


# Connects to a copy of its own of the filled database.
Filled = Callable[..., AbstractAsyncContextManager[AsyncEngine]]


@pytest.fixture(scope="module")
def templates(stores: Stores) -> Iterator[Mapping[Statistics, str]]:
    tables = ("senders", "batches", "email_jobs", "batch_counts")
    with filled_databases(stores, "outbox_lists", _FILL.split(";\n"), tables) as names:
        yield names


@pytest.fixture
def filled(templates: Mapping[Statistics, str], new_database: Callable[..., str]) -> Filled:
    @asynccontextmanager
    async def connect(statistics: Statistics) -> AsyncIterator[AsyncEngine]:
        url = new_database(templates[statistics])
        engine = create_engine(load_settings(database_url=url), lookups_only=True)
        try:
            yield engine
        finally:
            await engine.dispose()

    return connect


def rows_of(node: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the rows that each scan of a table read, those that it discarded included."""
    if "Relation Name" in node:
        rows = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
        rows += node.get("Rows Removed by Index Recheck", 0)
        yield f"{node['Node Type']} on {node['Relation Name']}", rows * node["Actual Loops"]
    for inner in node.get("Plans", ()):
        yield from rows_of(inner)


async def reads_of(engine: AsyncEngine, call: Callable[[Any], Any]) -> tuple[Any, float, str]:
    """Return the result of `call`, how many rows its statements read, and what they did."""
    ran: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        ran.append((statement, parameters))

    async with engine.connect() as connection:
        event.listen(engine.sync_engine, "before_cursor_execute", note)
        result = await call(connection)
        event.remove(engine.sync_engine, "before_cursor_execute", note)
        total, report = 0.0, []
        for statement, parameters in ran:
            if statement.startswith("INSERT INTO suppression_counts "):
                continue  # a user's first count: one row, which cannot be inserted twice
            explained = await connection.exec_driver_sql(
                f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {statement}", parameters
            )
            plan = explained.scalar_one()
            plan = json.loads(plan) if isinstance(plan, str) else plan
            for name, rows in rows_of(plan[0]["Plan"]):
                total += rows
                report.append(f"{rows:9.0f} {name}")
        return result, total, "\n".join(report)


def rows_read(report: str, table: str) -> int:
    """Return how many rows of a table a call has read, of a report of `reads_of`."""
    return sum(int(line.split()[0]) for line in report.splitlines() if line.endswith(table))


def job_filter(text: str, **order: bool) -> JobFilter:
    return JobFilter("big", check_filter(parse_filter(text), JOB_FIELDS), **order)


@pytest.mark.parametrize("statistics", [Statistics.CURRENT, Statistics.NONE])
async def test_no_page_reads_more_rows_than_the_budget(
    filled: Filled, statistics: Statistics
) -> None:
    async with filled(statistics) as engine:
        for text in JOBS:
            for which, after in (
                (job_filter(text), (0, 0)),
                (job_filter(text), (1, 30_000)),
                (job_filter(text, descending=True), (SMALL - 300, 5)),
            ):
                _, rows, report = await reads_of(engine, partial(walk_from, which, after))
                about = f"{text!r} after {after} read {rows:,.0f}\n{report}"
                assert rows <= MOST, about
                assert "Seq Scan on email_jobs" not in report, about
        due = job_filter("sender_id = 2 AND state = SCHEDULED", by_due_time=True)
        walked, rows, report = await reads_of(engine, partial(walk_from, due, due.start))
        assert len(walked.found) == 51
        assert rows <= MOST, report
        text = f"sender_id = 2 AND state = SCHEDULED AND ({LABELS})"
        due = job_filter(text, by_due_time=True)
        _, rows, report = await reads_of(engine, partial(walk_from, due, due.start))
        assert rows <= MOST, report


async def test_a_page_by_address_reads_few_rows_although_others_write_to_it(filled: Filled) -> None:
    async with filled(Statistics.NONE) as engine:
        async with engine.begin() as connection:
            await connection.exec_driver_sql(
                "UPDATE email_jobs SET recipient = 'popular@y.test'"
                " WHERE sender_id > 10 AND row_number <= 7 OR batch_id = 1 AND row_number < 3"
            )
            await connection.exec_driver_sql("ANALYZE")
        which = job_filter("recipient = popular@y.test")
        found: list[JobPosition] = []
        after: JobPosition | None = which.start
        while after is not None:
            walked, rows, report = await reads_of(engine, partial(walk_from, which, after))
            assert rows <= MOST, report
            found += walked.found
            after = walked.reached
        assert len(found) == 2
        # Those of one batch are found at once.
        walked, _, _ = await reads_of(
            engine,
            partial(walk_from, job_filter("recipient = popular@y.test AND batch_id = 1"), (0, 0)),
        )
        assert len(walked.found) == 2


@pytest.mark.parametrize("statistics", [Statistics.CURRENT, Statistics.NONE])
async def test_a_list_across_all_users_reads_as_few_rows_as_that_of_one(
    filled: Filled, statistics: Statistics
) -> None:
    async with filled(statistics) as engine:
        for text in JOBS:
            for descending in (False, True):
                which = replace(job_filter(text, descending=descending), user_id=None)
                _, rows, report = await reads_of(engine, partial(walk_from, which, which.start))
                about = f"{text!r} of all users read {rows:,.0f}\n{report}"
                assert rows <= MOST, about
                assert "Seq Scan on email_jobs" not in report, about
        async with engine.begin() as connection:
            await connection.exec_driver_sql(
                "INSERT INTO senders (user_id, email, hourly_limit)"
                " SELECT 'u12', 's@x.org', 9 FROM generate_series(1, 20000)"
            )
        first = ["big", "u11", "u12", "u13", "u14", "u15"]
        for tree, descending, expected in (
            (None, False, first),
            (None, True, None),
            (FieldTest("user_id", "=", "u12"), True, ["u12"]),
        ):
            call = partial(list_users, tree=tree, after="", limit=6, descending=descending)
            (users, reached), rows, report = await reads_of(engine, call)
            shown = [user.user_id for user in users]
            assert shown == (expected or sorted(shown, reverse=True))
            assert (len(shown), reached) == (len(expected or first), None)
            assert rows <= 100, report


async def test_an_import_finds_waiting_mail_by_its_addresses(filled: Filled) -> None:
    async with filled(Statistics.CURRENT) as engine:
        reasons = {f"R{n}@y.test": "" for n in range(30_000, 31_000)}
        call = partial(suppress_all, user_id="big", reasons=reasons, quotas=QUOTAS)
        (created, part), rows, report = await reads_of(engine, call)
        assert (created, part.ended.jobs) == (1_000, 1_000)
        assert "Seq Scan on email_jobs" not in report, report
        # Three looks at the job of each address, and one at each sender's first job.
        assert rows_read(report, "email_jobs") <= 5_000, report
        # The ten senders of the user are read for both spellings of each address, to ask for it and
        # to find its jobs.
        assert rows <= 50_000, report


async def test_a_suppression_reads_few_jobs_of_others_to_its_address(filled: Filled) -> None:
    # Each batch has a job to it.
    address = "r7@y.test"
    async with filled(Statistics.CURRENT) as engine:
        for call in (
            partial(insert_suppression, user_id="u11", address=address, reason="", quotas=QUOTAS),
            partial(suppress_all, user_id="u12", reasons={address: ""}, quotas=QUOTAS),
            partial(suppress_erased, user_id="u13", address=address),
        ):
            (_, part), _, report = await reads_of(engine, call)
            assert part.ended.jobs > 0
            assert not part.rest.left
            assert rows_read(report, "email_jobs") < SMALL - 200, report


async def walk_from(which: JobFilter, after: JobPosition, connection: AsyncConnection) -> FoundJobs:
    return await walk_jobs(connection, which, after, 51)


async def test_no_page_of_batches_reads_more_rows_than_the_budget(filled: Filled) -> None:
    async with filled(Statistics.CURRENT) as engine:
        for text in BATCHES:
            tree = check_filter(parse_filter(text), BATCH_FIELDS)
            page = partial(
                list_batches,
                user_id="big",
                tree=tree,
                after_id=2**63 - 1,
                limit=51,
                descending=True,
            )
            _, rows, report = await reads_of(engine, page)
            assert rows <= 3 * MOST_READ, f"{text!r} {rows:,.0f}\n{report}"


async def test_a_page_of_common_matches_reads_little_more_than_it_shows(filled: Filled) -> None:
    async with filled(Statistics.CURRENT) as engine:
        for text, most in (
            ("", 500),
            ("state = SENT", 1_000),
            ("batch_id = 1 AND state = SENT", 700),
            ("state = FAILED", 5_000),
            ("state = SENDING", 500),
            ("external_id = rare", 200),
        ):
            which = job_filter(text)
            walked, rows, report = await reads_of(engine, partial(walk_from, which, (0, 0)))
            assert walked.found, text
            assert rows <= most, f"{text!r} read {rows:,.0f}\n{report}"


async def test_a_walk_in_parts_finds_every_match_once(filled: Filled) -> None:
    async with (
        filled(Statistics.CURRENT) as engine,
        engine.connect() as connection,
    ):
        for text in ("state = SCHEDULED", "state = FAILED", "row_number = 7", "state = SENDING"):
            which = job_filter(text)
            found: list[JobPosition] = []
            after: JobPosition | None = which.start
            while after is not None:
                walked = await walk_jobs(connection, which, after, 1_000)
                found += walked.found
                full = len(walked.found) == 1_000
                after = walked.found[-1] if full else walked.reached
            condition = text.replace("state", "state::text")
            for name, number in (("SCHEDULED", 1), ("SENDING", 2), ("FAILED", 4)):
                condition = condition.replace(name, f"'{number}'")
            expected = await connection.exec_driver_sql(
                "SELECT batch_id, id FROM email_jobs WHERE sender_id <= 10"
                f" AND {condition} ORDER BY 1, 2"
            )
            assert found == [tuple(row) for row in expected], text


async def test_an_erasure_reads_no_row_of_others(filled: Filled) -> None:
    """Its cost is the same, however much mail others send to the address, and have rejected."""
    address = "popular@y.test"
    give = (
        "UPDATE email_jobs SET recipient = 'popular@y.test' WHERE sender_id {} AND row_number < 4"
    )
    reject = (
        "WITH of_batch AS (UPDATE batches SET rejected_count = 3 WHERE sender_id {} RETURNING id)"
        " INSERT INTO batch_rejections (batch_id, row_number, column_name, reason, detail)"
        " SELECT id, n, '', '', 'popular@y.test' FROM of_batch, generate_series(1, 3) AS n"
    )
    calls = (
        partial(suppress_erased, user_id="u11", address=address),
        partial(erase_jobs, user_id="u11", address=address),
        partial(count_left, user_id="u11", address=address),
        partial(read_rejections, user_id="u11", after=(0, 0)),
        partial(erase_cooldowns, user_id="u11", address=address),
    )
    async with filled(Statistics.NONE) as engine:
        found: list[tuple[float, str]] = []
        for owners in ("= 11", "<> 11"):
            async with engine.begin() as connection:
                for statement in (give, reject):
                    await connection.exec_driver_sql(statement.format(owners))
                await connection.exec_driver_sql("ANALYZE")
            reads = [await reads_of(engine, call) for call in calls]
            assert reads[1][0] > 0
            assert len(reads[3][0][0]) == 3 * SMALL / 20
            # The rows of the user itself that others cannot add to.
            found.append((sum(rows for _, rows, _ in reads), "\n\n".join(r for _, _, r in reads)))
        assert found[1][0] <= found[0][0], f"{found[0][1]}\n\nand then\n\n{found[1][1]}"
