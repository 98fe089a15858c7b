"""Rows about a large backlog: Redis' memory, the rate of sending, and the rebuild."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Final

from redis.asyncio import Redis

from bench.bench import Bench, Connection
from bench.dispatching import fill_due, settings_for
from bench.filling import add_jobs
from bench.results import OUTBOX, Figures, RatioTarget
from bench.row import BenchRow
from bench.watching import SENT, watch

FEW_SENDERS: Final = 1_000
_SMALL: Final = 10_000
_LIMIT_S: Final = 600.0
_READY: Final = "outbox:{0}:ready"
_GENERATION: Final = "outbox:{0}:generation"
# With their indexes.
_BYTES: Final = """
    SELECT pg_total_relation_size('email_jobs') / (SELECT count(*) FROM email_jobs)::float,
           pg_total_relation_size('attempts') / (SELECT count(*) FROM attempts)::float
"""
_NOW_DUE: Final = """
    UPDATE email_jobs SET scheduled_at = now() - interval '1 second'
    WHERE id IN (SELECT min(id) FROM email_jobs WHERE state = 1 GROUP BY sender_id)
"""
_SENT_SINCE: Final = """
    SELECT count(DISTINCT sender_id), extract(epoch FROM min(started_at) - %(since)s),
           extract(epoch FROM max(started_at) - %(since)s)
    FROM attempts WHERE started_at > %(since)s
"""


async def until_loaded(redis: Redis, senders: int) -> float:
    """Return the seconds until Redis has the heads of all senders."""
    began = time.monotonic()
    while not await redis.exists(_GENERATION) or await redis.zcard(_READY) < senders:
        if time.monotonic() - began > _LIMIT_S:
            raise RuntimeError(f"Redis had not loaded {senders} senders after {_LIMIT_S:.0f} s")
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def _memory(jobs: int, bench: Bench) -> dict[str, float]:
    async with (
        bench.waiting(FEW_SENDERS, jobs) as stack,
        bench.redis() as redis,
        bench.connected(stack.database_url) as connection,
    ):
        sizes = await (await connection.execute(_BYTES)).fetchone()
        before = (await redis.info("memory"))["used_memory"]
        with stack.process("dispatcher"):
            await until_loaded(redis, FEW_SENDERS)
            after = (await redis.info("memory"))["used_memory"]
    if sizes is None:
        raise RuntimeError("PostgreSQL says no sizes")
    return {
        "mb": (after - before) / 1e6,
        "job_bytes": float(sizes[0]),
        "attempt_bytes": float(sizes[1]),
    }


async def _redis_bytes(bench: Bench, number: int) -> Figures:
    del number
    tenth, all_of_it = [await _memory(jobs, bench) for jobs in (bench.size.tenth, bench.size.jobs)]
    return all_of_it | {"mb_tenth": tenth["mb"]}


async def _send_beside(senders: int, jobs: int, bench: Bench, number: int) -> Figures:
    """Send mail of some of the senders that have the backlog."""
    async with (
        bench.waiting(senders, jobs) as stack,
        bench.connected(stack.database_url) as connection,
        bench.redis() as redis,
    ):
        before = await _count(connection)
        found = await connection.execute(
            "SELECT id FROM senders WHERE email LIKE 's%%' ORDER BY id LIMIT %s",
            [bench.size.senders],
        )
        ids = [row[0] for row in await found.fetchall()]
        each = bench.size.mails // len(ids)
        # Due once the dispatcher has loaded all senders.
        lead = await bench.lead_s() + senders / 1_000
        row = await (
            await connection.execute("SELECT now() + make_interval(secs => %s)", [lead])
        ).fetchone()
        begin = time.monotonic() + lead
        name = f"due{number}-"
        await add_jobs(connection, ids, each, start=row[0] if row else None, name=name)
        await connection.execute("ANALYZE email_jobs")
        with stack.process("dispatcher", **settings_for(50)) as process:
            await until_loaded(redis, senders)
            if time.monotonic() > begin:
                raise RuntimeError("mail was due before all senders were loaded")
            pids = stack.stores | {"dispatcher": process.pid}
            # The mails of earlier rounds are counted as well.
            query = f"SELECT count(*) - {before} FROM attempts WHERE outcome = 1"
            return await watch(bench, stack.database_url, query, each * len(ids), pids)


async def _count(connection: Connection) -> int:
    row = await (await connection.execute(SENT.encode())).fetchone()
    return int(row[0]) if row else 0


async def _backlog(bench: Bench, number: int) -> Figures:
    jobs = bench.size.jobs
    return await _send_beside(jobs // 100, jobs, bench, number)


async def _small_backlog(bench: Bench, number: int) -> Figures:
    return await _send_beside(FEW_SENDERS, _SMALL, bench, number)


async def _holding(held: bool, bench: Bench, number: int) -> Figures:
    """Send mail while a transaction of somebody else stays open, or none."""
    del number
    async with (
        bench.fresh() as stack,
        bench.connected(stack.database_url) as connection,
        bench.connected(stack.database_url) as other,
    ):
        total = await fill_due(connection, bench.size.senders, bench.size.held_mails)
        if held:
            # Its snapshot keeps every dead row from now on.
            await other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            await other.execute("SELECT count(*) FROM senders")
        with stack.process("dispatcher", **settings_for(50)) as process:
            pids = stack.stores | {"dispatcher": process.pid}
            # The end of the run, when the dead rows are many.
            return await watch(bench, stack.database_url, SENT, total, pids, first=0.6, last=0.95)


async def _rebuild(bench: Bench, number: int) -> Figures:
    del number
    async with (
        bench.waiting(FEW_SENDERS, bench.size.tenth) as stack,
        bench.connected(stack.database_url) as connection,
        bench.redis() as redis,
    ):
        with stack.process("dispatcher", **settings_for(50)):
            await until_loaded(redis, FEW_SENDERS)
            # In one statement, and Redis is emptied right after it: nobody loads them in between.
            await connection.execute(_NOW_DUE)
            row = await (await connection.execute("SELECT clock_timestamp()")).fetchone()
            since = row[0] if row else None
            began = time.monotonic()
            await redis.flushall()
            while time.monotonic() - began < 60:
                found = await (await connection.execute(_SENT_SINCE, {"since": since})).fetchone()
                if found is not None and found[0] >= FEW_SENDERS:
                    return {"first_s": float(found[1]), "all_s": float(found[2])}
                await asyncio.sleep(0.1)
    raise RuntimeError("not all senders had sent a minute after FLUSHALL")


_LARGE_BACKLOG, _SMALL_BACKLOG = OUTBOX, f"{OUTBOX}, {_SMALL:,} waiting"
_FREE = f"{OUTBOX}, none open"
ROWS: Final = (
    BenchRow(
        "redis_bytes",
        f"Redis' memory with the waiting jobs of {FEW_SENDERS:,} senders, and with a tenth of them",
        {OUTBOX: _redis_bytes},
        (
            RatioTarget((OUTBOX, "mb"), 5.0, most=1.0),
            RatioTarget((OUTBOX, "mb_tenth"), 5.0, most=1.0),
        ),
        size=lambda size: f"{size.jobs:,} and {size.tenth:,} waiting jobs",
    ),
    BenchRow(
        "backlog",
        "rate of sending beside waiting jobs of 100 per sender, at concurrency 50",
        {_LARGE_BACKLOG: _backlog, _SMALL_BACKLOG: _small_backlog},
        (
            RatioTarget(
                (_LARGE_BACKLOG, "mails_per_s"), ((_SMALL_BACKLOG, "mails_per_s"),), least=0.9
            ),
        ),
        size=lambda size: f"{size.jobs:,} waiting jobs of {size.jobs // 100:,} senders",
    ),
    BenchRow(
        "held_transaction",
        "rate of sending while another transaction stays open, after 60 % of the mails",
        {OUTBOX: partial(_holding, True), _FREE: partial(_holding, False)},
        (RatioTarget((OUTBOX, "mails_per_s"), ((_FREE, "mails_per_s"),), least=0.9),),
        size=lambda size: f"{size.held_mails:,} mails",
    ),
    BenchRow(
        "rebuild",
        "from FLUSHALL to the first send, and until each sender has sent its due mail",
        {OUTBOX: _rebuild},
        (
            RatioTarget((OUTBOX, "first_s"), 0.5, most=1.0),
            RatioTarget((OUTBOX, "all_s"), 2.0, most=1.0),
        ),
        size=lambda size: f"{size.tenth:,} waiting jobs of {FEW_SENDERS:,} senders",
    ),
)
