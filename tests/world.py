"""Senders, batches and jobs in PostgreSQL, written as the scheduler writes them."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Sized
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Protocol, Self

import psycopg
from psycopg.rows import namedtuple_row

from outbox_server.shared.audit.replay import least_gap, most_in_window
from outbox_server.shared.database.counts import batch_counts, sender_counts
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.connection import connect, open_queues
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import AttemptOutcome, JobState

# One transaction, as in an intake: the batch, its jobs, their count deltas, the marker.
_INTAKE: Final = """
WITH batch AS (
    INSERT INTO batches (user_id, sender_id, request_id, request_hash, subject, body, start_at,
                         duplicates, mode, accepted_count)
    SELECT user_id, id, %(request)s, '\\x00', 'Mail', 'Hello', now(), 1, 1, %(n)s
    FROM senders WHERE id = %(sender)s
    RETURNING id, sender_id
), jobs AS (
    INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient)
    SELECT batch.id, sender_id, clock_timestamp() + %(due)s + (number - 1) * %(spacing)s::interval,
           number, 'r' || number || '@y.test'
    FROM batch, generate_series(1, %(n)s) AS number
    RETURNING id
), counted AS (
    INSERT INTO count_deltas (sender_id, batch_id, hour, state, n)
    SELECT sender_id, id, date_trunc('hour', now()), 1, %(n)s FROM batch
), marked AS (
    INSERT INTO head_markers (sender_id) VALUES (%(sender)s)
)
SELECT id FROM jobs ORDER BY id
"""
_CANCEL: Final = """
WITH ended AS (
    UPDATE email_jobs SET state = 6, finished_at = now()
    WHERE id = ANY(%s) AND state = 1
    RETURNING sender_id, batch_id, date_trunc('hour', finished_at) AS hour
), sums AS (
    SELECT sender_id, batch_id, hour, count(*) AS n FROM ended GROUP BY 1, 2, 3
), counted AS (
    INSERT INTO count_deltas (sender_id, batch_id, hour, state, n)
    SELECT sender_id, batch_id, hour, 1, -n FROM sums
    UNION ALL SELECT sender_id, batch_id, hour, 6, n FROM sums
)
SELECT count(*) AS n FROM ended
"""
# A shard with a valid life, for tests that mark jobs which no queue handed out.
TEST_SHARD: Final = 999
TEST_LIFE: Final = "test"
_JOB_IN_MESSAGE_ID = re.compile(r"<outbox\.(\d+)\.")


class Mail(Protocol):
    """A mail accepted by any SMTP server of the tests."""

    @property
    def mail_from(self) -> str: ...
    @property
    def started_at(self) -> float: ...
    @property
    def received_at(self) -> float: ...
    @property
    def message_id(self) -> str: ...


@dataclass(frozen=True)
class AttemptRow:
    attempt: int
    outcome: AttemptOutcome
    counted: bool
    started_at: float
    ended_at: float
    smtp_code: int | None
    enhanced_code: str | None
    message: str | None


class World:
    """An installation without a scheduler: its PostgreSQL, its Redis, and a loader of heads."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine = create_engine(settings, lookups_only=True)
        self.redis = connect(settings)
        self.queues = open_queues(self.redis, settings)
        self.loader = HeadLoader(self.engine, self.queues, settings)
        self._numbers = itertools.count(1)
        self._stack = AsyncExitStack()
        self._connection: psycopg.AsyncConnection[Any]

    async def __aenter__(self) -> Self:
        self._connection = await self.connect()
        self._stack.push_async_callback(self.engine.dispose)
        self._stack.push_async_callback(self.redis.aclose)
        await self.sql(
            "INSERT INTO shard_lives (shard, life) VALUES (%s, %s) ON CONFLICT DO NOTHING",
            TEST_SHARD,
            TEST_LIFE,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()
        await self._stack.aclose()

    async def connect(self) -> psycopg.AsyncConnection[Any]:
        """Return another connection, with autocommit."""
        return await psycopg.AsyncConnection.connect(
            self.settings.database_url,
            autocommit=True,
            options="-c timezone=UTC",
            row_factory=namedtuple_row,
        )

    async def sql(self, statement: str, *values: Any) -> list[Any]:
        """Run a statement in its own transaction; return its rows, if it has any."""
        if self._connection.closed:
            self._connection = await self.connect()
        cursor = await self._connection.execute(statement, values or None)
        return await cursor.fetchall() if cursor.description else []

    # Changes that callers make ---------------------------------------------------------------

    async def sender(
        self,
        *,
        user: str = "anna",
        limit: int = 100_000,
        gap_ms: int | None = None,
        **more: Any,
    ) -> int:
        """Add a sender, `s<id>@x.test`."""
        columns = {"hourly_limit": limit, "min_gap_ms": gap_ms, "max_in_flight": 5} | more
        rows = await self.sql(
            f"INSERT INTO senders (user_id, email, {', '.join(columns)})"
            f" VALUES (%s, 'new', {', '.join(['%s'] * len(columns))}) RETURNING id",
            user,
            *columns.values(),
        )
        sender = int(rows[0].id)
        await self.sql("UPDATE senders SET email = %s WHERE id = %s", address_of(sender), sender)
        return sender

    async def schedule(
        self,
        sender: int,
        n: int = 1,
        *,
        due: timedelta = timedelta(0),
        spacing: timedelta = timedelta(0),
        load: bool = True,
    ) -> list[int]:
        """Accept a batch of `n` mails; with `load`, load it into Redis as the scheduler does."""
        cursor = await self._connection.execute(
            _INTAKE,
            {
                "request": f"r{next(self._numbers)}",
                "n": n,
                "sender": sender,
                "due": due,
                "spacing": spacing,
            },
        )
        jobs = [int(row.id) for row in await cursor.fetchall()]
        if load:
            await self.loader.load([sender], committed=True)
        return jobs

    async def due_now(self, sender: int) -> None:
        """Make the waiting jobs of a sender due, in the order of their ids."""
        await self.sql(
            "UPDATE email_jobs SET scheduled_at = now() WHERE sender_id = %s AND state = 1", sender
        )
        await self.loader.load([sender], committed=True)

    async def change(self, sender: int, *, load: bool = True, **columns: Any) -> None:
        """Change a sender: pause, resume, or another limit."""
        names = ", ".join(f"{name} = %s" for name in columns)
        await self.sql(
            f"WITH marked AS (INSERT INTO head_markers (sender_id) VALUES (%s))"
            f" UPDATE senders SET {names}, revision = revision + 1 WHERE id = %s",
            sender,
            *columns.values(),
            sender,
        )
        if load:
            await self.loader.load([sender], committed=True)

    async def cancel(
        self, jobs: Sequence[int], connection: psycopg.AsyncConnection[Any] | None = None
    ) -> int:
        """Cancel those of these jobs that wait; return their number."""
        cursor = await (connection or self._connection).execute(_CANCEL, [list(jobs)])
        row = await cursor.fetchone()
        return int(row.n) if row else 0

    # Reading the state -----------------------------------------------------------------------

    async def states(self, *senders: int) -> Counter[JobState]:
        """Return the number of jobs in each state."""
        rows = await self.sql(
            "SELECT state, count(*) AS n FROM email_jobs"
            " WHERE cardinality(%s::bigint[]) = 0 OR sender_id = ANY(%s) GROUP BY 1",
            list(senders),
            list(senders),
        )
        return Counter({JobState(row.state): row.n for row in rows})

    async def in_state(self, *states: JobState) -> set[int]:
        """Return the jobs in these states."""
        rows = await self.sql("SELECT id FROM email_jobs WHERE state = ANY(%s)", list(states))
        return {row.id for row in rows}

    async def done(self, *senders: int) -> bool:
        """Return whether every job is in a final state."""
        states = await self.states(*senders)
        return not states[JobState.SCHEDULED] and not states[JobState.SENDING]

    async def job(self, job: int) -> Any:
        """Return the row of a job."""
        return (await self.sql("SELECT * FROM email_jobs WHERE id = %s", job))[0]

    async def attempts(self, job: int) -> list[AttemptRow]:
        """Return the attempts at a job, by number; times are seconds since 1970."""
        rows = await self.sql(
            "SELECT * FROM attempts WHERE email_job_id = %s ORDER BY attempt", job
        )
        return [
            AttemptRow(
                row.attempt,
                AttemptOutcome(row.outcome),
                row.counted,
                row.started_at.timestamp(),
                row.ended_at.timestamp(),
                row.smtp_code,
                row.enhanced_code,
                row.message,
            )
            for row in rows
        ]

    async def leases_in_redis(self, sender: int) -> int:
        """Return the number of claims of a sender in Redis."""
        key = self.loader.queue_of(sender).keys.ready.replace("ready", f"lease:{sender}")
        return int(await self.redis.zcard(key))

    async def check_sent(
        self, mails: Sequence[Mail], jobs: Sequence[int], limits: Mapping[int, int]
    ) -> None:
        """Check that these are all jobs, each was sent once, and senders kept gap and limit.

        `mails` are those that the SMTP side saw, and `limits` the hourly limits of senders.
        """
        assert await self.states() == {JobState.SENT: len(jobs)}
        assert jobs_in(mails) == dict.fromkeys(jobs, 1)
        for sender, limit in limits.items():
            assert gap_of(mails, sender) >= self.settings.min_gap.total_seconds()
            assert most_of(mails, sender, self.settings.rate_window) <= limit
        await self.check_counts()

    async def check_counts(self) -> None:
        """Compare every count with a recount of the rows, also by the hour of each final state."""
        # A SCHEDULED row that is cancelled, alone or with its batch, will become CANCELLED.
        jobs = """(
            SELECT j.sender_id, j.batch_id, CASE WHEN j.state = 1 AND (c.batch_id IS NOT NULL
                   OR EXISTS (SELECT FROM job_changes o JOIN job_change_blocks b
                              ON b.change_id = o.id AND b.block = j.id >> 6
                              WHERE o.batch_id = j.batch_id AND o.kind = 1
                              AND b.bits >> (j.id & 63)::int & 1 = 1))
                   THEN 6 ELSE j.state END AS state
            FROM email_jobs j LEFT JOIN batch_cancellations c USING (batch_id)) AS jobs"""
        recount: dict[str, dict[int, Counter[JobState]]] = {
            "sender_id": defaultdict(Counter),
            "batch_id": defaultdict(Counter),
        }
        for key, found in recount.items():
            for row in await self.sql(
                f"SELECT {key} AS id, state, count(*) AS n FROM {jobs} GROUP BY 1, 2"
            ):
                found[row.id][JobState(row.state)] = row.n
        async with self.engine.connect() as connection:
            senders = await sender_counts(connection, recount["sender_id"])
            batches = await batch_counts(connection, recount["batch_id"])
        for name, counted in (("sender_id", senders), ("batch_id", batches)):
            for owner, counts in counted.items():
                assert {state: counts[state] for state in JobState} == {
                    state: recount[name][owner][state] for state in JobState
                }, f"{name} {owner}"
        off = await self.sql(
            """
            SELECT sender_id, hour, state, counted.n AS counted, recount.n AS recount FROM (
                SELECT sender_id, hour, state, sum(n) AS n FROM (
                    SELECT sender_id, hour, state, n FROM count_deltas WHERE state <> 1
                    UNION ALL SELECT sender_id, hour, state, n FROM sender_hour_counts
                ) AS parts GROUP BY 1, 2, 3 HAVING sum(n) <> 0
            ) AS counted FULL JOIN (
                SELECT sender_id, date_trunc('hour', finished_at) AS hour, state, count(*) AS n
                FROM email_jobs WHERE finished_at IS NOT NULL GROUP BY 1, 2, 3
            ) AS recount USING (sender_id, hour, state)
            WHERE counted.n IS DISTINCT FROM recount.n
            """
        )
        assert off == []


def address_of(sender: int) -> str:
    """Return the From address of a sender that `World.sender` added."""
    return f"s{sender}@x.test"


def at_least(n: int, mails: Sized) -> bool:
    """Return whether that many mails have arrived."""
    return len(mails) >= n


def jobs_in(mails: Iterable[Mail]) -> Counter[int]:
    """Return the number of arrivals of each job's mail."""
    found: Counter[int] = Counter()
    for mail in mails:
        match = _JOB_IN_MESSAGE_ID.match(mail.message_id)
        assert match, mail.message_id
        found[int(match[1])] += 1
    return found


def mails_of(mails: Iterable[Mail], sender: int) -> list[Mail]:
    """Return the mails of one sender."""
    return [mail for mail in mails if mail.mail_from == address_of(sender)]


def gap_of(mails: Iterable[Mail], sender: int) -> float:
    """Return the smallest gap of a sender on the SMTP side in seconds, or inf."""
    gap = least_gap((mail.started_at, mail.received_at) for mail in mails_of(mails, sender))
    return float("inf") if gap is None else gap


def most_of(mails: Iterable[Mail], sender: int, window: timedelta) -> int:
    """Return the most mails of a sender in any trailing window on the SMTP side."""
    ends = [mail.received_at for mail in mails_of(mails, sender)]
    return most_in_window(ends, window.total_seconds())
