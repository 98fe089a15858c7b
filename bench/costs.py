"""`python -m bench.costs`: what parts of a send cost, side by side with sending without them.

One dispatcher in this process sends the same mails again and again, with all of it and without a
part. A machine that is shared drifts, so the rounds are short and many, each compares sends that
follow one another, in an order by chance, and each send starts from empty tables and an empty
Redis. What is left out is cut from the SQL of the product right here, and a cut that finds nothing
ends the run. All statements are given as text, the whole ones as well, so that only the servers'
work differs. Redis keeps its leases: they are the limiter's reservations too.

The rate is bound by the processors, and these are shared: so the processor time of all processes of
the stack, by mail, is measured beside it. It tells the same without the neighbours.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple
from unittest.mock import patch

import psycopg
import uvloop
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table
from sqlalchemy import TextClause, text
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.sql import ClauseElement

from bench.world import BenchStack, world
from services.dispatcher.server import serve
from services.dispatcher.storage import marking, settling
from shared.queue.queue import Claim, Queue
from shared.settings import load_settings

SENDERS, CONCURRENCY = 100, 20
_LIMIT_S = 120.0

_SENDERS = """
    INSERT INTO senders (user_id, email, hourly_limit, max_in_flight)
    SELECT 'bench', 's' || i || '@example.com', 1000000, 20 FROM generate_series(1, %s) AS i
"""
_EMPTY = """
    TRUNCATE batches, email_jobs, attempts, head_markers,
             count_deltas, sender_counts, batch_counts, sender_hour_counts
    CASCADE
"""
_FILL = """
    WITH added AS (
        INSERT INTO batches (user_id, sender_id, request_id, request_hash, subject, body, html,
                             variable_names, start_at, duplicates, mode, accepted_count)
        SELECT user_id, id, %(round)s || ': ' || id, '\\x00', 'Your order {{ order }}',
               'Dear {{ name }}, your order {{ order }} leaves {{ city }} today.',
               '<p>Dear {{ name }}, your order <b>{{ order }}</b> leaves {{ city }} today.</p>',
               '{name,order,city}', now(), 1, 1, %(mails)s
        FROM senders RETURNING id, sender_id
    ), jobs AS (
        INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient, variables)
        SELECT id, sender_id, now(), i, 'r' || i || '@example.net',
               '["Ann Example ' || i || '","' || i || '","Springfield"]'
        FROM added, generate_series(1, %(mails)s) AS i
    )
    INSERT INTO head_markers (sender_id) SELECT sender_id FROM added
"""
_WAITING = "SELECT count(*) FROM email_jobs WHERE state < 3"
_RATE = """
    SELECT count(*) / extract(epoch FROM max(finished_at) - min(finished_at))
    FROM email_jobs JOIN batches ON batches.id = batch_id WHERE starts_with(request_id, %s || ': ')
"""

# What is cut from a statement: pattern and replacement.
Cuts = Sequence[tuple[str, str]]
_LEASE_INDEX: Final = "CREATE INDEX ix_email_jobs_lease ON email_jobs (lease_until) WHERE state = 2"
_LEASE_CHECK: Final = (
    "ALTER TABLE email_jobs ADD CONSTRAINT {} CHECK ((state = 2) = (lease_until IS NOT NULL))"
)
_UNFENCED: Final[Cuts] = (
    (r" AND email_jobs\.attempt = anon_1\.attempt - :attempt_1\S*", ""),
    (r" AND email_jobs\.attempt = judged\.attempt - :attempt_2\S*", ""),
    (r"lease_until=CASE .*? END, ", ""),
    (r", attempt=CASE .*? END FROM judged", " FROM judged"),
    # Nobody wrote it: the answer has the claim's.
    (r"RETURNING email_jobs\.id, email_jobs\.attempt", "RETURNING email_jobs.id, judged.attempt"),
)
_UNLOGGED: Final[Cuts] = ((r"logged AS .*?groups AS", "groups AS"),)
_UNCHECKED: Final[Cuts] = (
    (r"WITH sendable AS .*?judged AS", "WITH judged AS"),
    (r" JOIN sendable ON sendable\.id = email_jobs\.batch_id", ""),
    (r"CASE WHEN \(EXISTS .*? END AS state", "2 AS state"),
)
_NOT_LATE: Final[Cuts] = ((r"counted, late_ms,", "counted,"), (r"anon_1\.late_ms AS late_ms, ", ""))
_LEASED: Final = "leases, fencing and attempt log"
# By part: of the mark, the settlement, and what gives a job back.
_PARTS: Final[dict[str, tuple[Cuts, Cuts, Cuts]]] = {
    _LEASED: (
        _UNFENCED,
        (
            (r"lease_until=NULL, ", ""),
            (r" AND email_jobs\.attempt = anon_1\.attempt", ""),
            *_UNLOGGED,
        ),
        (
            (r", attempt=\(email_jobs\.attempt - [^)]*\)", ""),
            (r" AND email_jobs\.attempt = .*?(?= RETURNING)", ""),
        ),
    ),
    "attempt log alone": ((), _UNLOGGED, ()),
    "checks at the mark: batch FOR SHARE, suppression, expiry": (_UNCHECKED, (), ()),
    "late_ms": ((), _NOT_LATE, ()),
}
_WHOLE: Final = "nothing"


def _without(statement: ClauseElement, cuts: Cuts) -> TextClause:
    dialect = PGDialect_psycopg(paramstyle="named")  # type: ignore[no-untyped-call]
    compiled = statement.compile(dialect=dialect)
    sql = str(compiled)
    for pattern, replacement in cuts:
        sql, found = re.subn(pattern, replacement, sql, flags=re.DOTALL)
        if not found:
            raise SystemExit(f"no {pattern!r} in {sql}")
    used = {name: value for name, value in compiled.params.items() if f":{name}:" in sql}
    given = {name: value for name, value in used.items() if value is not None}
    return text(sql.replace("::", r"\:\:")).bindparams(**given)


async def _confirm_all(_: Queue, claims: Sequence[Claim]) -> list[bool]:
    return [True] * len(claims)


@contextmanager
def _statements(part: str) -> Iterator[None]:
    """Let the dispatcher use statements, given as text, that do without a part."""
    mark, settle, give_back = _PARTS.get(part, ((), (), ()))
    with (
        patch.object(marking, "_MARK", _without(marking._MARK, mark)),
        patch.object(settling, "_SETTLE", _without(settling._SETTLE, settle)),
        patch.object(settling, "_GIVE_BACK", _without(settling._GIVE_BACK, give_back)),
        patch.object(Queue, "confirm", _confirm_all if part == _LEASED else Queue.confirm),
    ):
        yield


@asynccontextmanager
async def _schema(connection: psycopg.AsyncConnection[Any], part: str) -> AsyncIterator[None]:
    """Have neither index nor constraint of leases where there are none."""
    if part != _LEASED:
        yield
        return
    cursor = await connection.execute(
        "SELECT conname FROM pg_constraint WHERE conname LIKE '%%lease_while_sending'"
    )
    found = await cursor.fetchone()
    if found is None:
        raise SystemExit("no constraint lease_while_sending")
    await connection.execute("DROP INDEX ix_email_jobs_lease")
    await connection.execute(f"ALTER TABLE email_jobs DROP CONSTRAINT {found[0]}".encode())
    yield
    await connection.execute(_LEASE_INDEX.encode())
    await connection.execute(_LEASE_CHECK.format(found[0]).encode())


class Measured(NamedTuple):
    """Of one send: mails a second, and us of processor time a mail."""

    rate: float
    processor_us: float


def _processor_s() -> float:
    """Return what this process and all below it have used, those that ended as well."""
    own = os.getpid()
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            # After the name, which may hold anything: proc_pid_stat(5).
            fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid], used[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    family = {own}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(used[pid] for pid in family) / os.sysconf("SC_CLK_TCK")


async def _round(
    stack: BenchStack,
    connection: psycopg.AsyncConnection[Any],
    part: str,
    name: str,
    mails: int,
) -> Measured:
    """Send `mails` mails without a part."""
    settings = load_settings(
        database_url=stack.servers.database_url,
        redis_url=stack.servers.redis_url,
        smtp_url=stack.smtp_url,
        auth="off",
        min_gap="0",
        log_level="warning",
        dispatcher_listen="127.0.0.1:0",
        dispatcher_concurrency=str(CONCURRENCY),
    )
    stop = asyncio.Event()
    async with _schema(connection, part), Redis.from_url(settings.redis_url) as redis:
        await connection.execute(_EMPTY)
        await redis.flushall()
        await connection.execute(_FILL, {"round": name, "mails": mails // SENDERS})
        await connection.execute("VACUUM ANALYZE")
        before = _processor_s()
        with _statements(part):
            async with asyncio.TaskGroup() as group:
                group.create_task(serve(settings, stop))
                await _until_sent(connection)
                used = _processor_s() - before
                stop.set()
    cursor = await connection.execute(_RATE, [name])
    row = await cursor.fetchone()
    if row is None:
        raise RuntimeError(_RATE)
    return Measured(float(row[0]), used / mails * 1e6)


async def _until_sent(connection: psycopg.AsyncConnection[Any]) -> None:
    end = time.monotonic() + _LIMIT_S
    while time.monotonic() < end:
        row = await (await connection.execute(_WAITING)).fetchone()
        if row is not None and not row[0]:
            return
        await asyncio.sleep(0.5)
    raise SystemExit(f"not all mails were sent in {_LIMIT_S:g} s")


async def _measure(parts: Sequence[str], rounds: int, mails: int) -> dict[str, list[Measured]]:
    """Return what was measured in each round, by what was left out."""
    found: dict[str, list[Measured]] = {part: [] for part in (_WHOLE, *parts)}
    chance = random.Random(1)  # noqa: S311 - an order, no secret
    with tempfile.TemporaryDirectory(prefix="outbox-bench-") as folder:
        async with (
            world(Path(folder)) as stack,
            await psycopg.AsyncConnection.connect(
                stack.servers.database_url, autocommit=True
            ) as connection,
        ):
            await connection.execute(_SENDERS, [SENDERS])
            await _round(stack, connection, _WHOLE, "warm-up", mails)
            for n in range(rounds):
                for part in chance.sample(list(found), len(found)):
                    measured = await _round(stack, connection, part, f"{part} {n}", mails)
                    found[part].append(measured)
                    Console(stderr=True).print(
                        f"{n + 1}/{rounds} without {part}: {measured.rate:,.0f} mails/s,"
                        f" {measured.processor_us:,.0f} us of a processor a mail"
                    )
    return found


def _shown(costs: Sequence[float]) -> str:
    """Return the median, and its bounds of 95 % by the bootstrap's percentiles."""
    chance = random.Random(1)  # noqa: S311 - a sample, no secret
    medians = sorted(median(chance.choices(costs, k=len(costs))) for _ in range(2_000))
    return f"{median(costs):.1%} ({medians[49]:.1%} to {medians[1949]:.1%})"


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="bench.costs", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--mails", type=int, default=10_000, help="mails a round and part")
    parser.add_argument("--all", action="store_true", help="each part alone as well")
    options = parser.parse_args()
    parts = list(_PARTS) if options.all else [_LEASED]
    found = uvloop.run(_measure(parts, options.rounds, options.mails))
    table = Table("without", "mails/s", "us a mail", "costs of the rate", "of processor time")
    for part, each in found.items():
        pairs = list(zip(found[_WHOLE], each, strict=True))
        table.add_row(
            part,
            f"{median(one.rate for one in each):,.0f}",
            f"{median(one.processor_us for one in each):,.0f}",
            _shown([1 - whole.rate / rest.rate for whole, rest in pairs]),
            _shown([1 - rest.processor_us / whole.processor_us for whole, rest in pairs]),
        )
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
