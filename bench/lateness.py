"""Rows about mail that is sent at its time: lateness, and fairness beside blocked mail."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any, Final

from redis.asyncio import Redis

from bench.bench import Bench, Connection
from bench.dispatching import settings_for
from bench.filling import add_jobs, add_senders
from bench.results import OUTBOX, Figures, RatioTarget
from bench.rivals.contenders import BULLMQ, DOES_LESS, rival_queue
from bench.rivals.contenders import SENT as SENT_BY_RIVAL
from bench.row import BenchRow
from bench.watching import SENT, watch

_SENDERS: Final = 500
_RATES: Final = (200, 1_000)
_OTHERS: Final = 100
_LATENESS: Final = """
    SELECT percentile_cont(0.50) WITHIN GROUP (ORDER BY late),
           percentile_cont(0.99) WITHIN GROUP (ORDER BY late), max(late),
           percentile_cont(0.99) WITHIN GROUP (ORDER BY late) FILTER (WHERE first)
    FROM ({}) AS each
"""
_OURS: Final = """
    SELECT 1000 * extract(epoch FROM a.started_at - j.scheduled_at) AS late,
           j.row_number = 1 AS first
    FROM attempts AS a JOIN email_jobs AS j ON j.id = a.email_job_id
"""
_THEIRS: Final = """
    SELECT 1000 * extract(epoch FROM started_at - due_at) AS late, id <= 500 AS first FROM mails
"""
# A sender whose hourly limit of 1 is used up, with all its mail due.
_BLOCK: Final = (
    "UPDATE senders SET hourly_limit = 1 WHERE id = ANY(%(ids)s)",
    """
    INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at, outcome, counted)
    SELECT -id, 1, id, now() - interval '1 minute', now() - interval '1 minute', 1, true
    FROM senders WHERE id = ANY(%(ids)s)
    """,
)
_LAST: Final = """
    SELECT count(*), max(1000 * extract(epoch FROM a.started_at - j.scheduled_at))
    FROM attempts AS a JOIN email_jobs AS j ON j.id = a.email_job_id
    WHERE j.sender_id = ANY(%s) AND a.outcome = 1
"""
_READ: Final = """
    SELECT sum(seq_tup_read + idx_tup_fetch) FROM pg_stat_user_tables WHERE relname = 'email_jobs'
"""


async def _figures(connection: Connection, query: str, rate: int) -> dict[str, float]:
    row = await (await connection.execute(_LATENESS.format(query).encode())).fetchone()
    names = ("p50_ms", "p99_ms", "max_ms", "first_p99_ms")
    return {f"{name}_{rate}": float(value) for name, value in zip(names, row or (), strict=True)}


def _per_sender(bench: Bench, rate: int) -> int:
    return max(2, rate * bench.size.seconds // _SENDERS)


async def _outbox(bench: Bench, number: int) -> Figures:
    del number
    figures: dict[str, float] = {}
    lead = await bench.lead_s()
    for rate in _RATES:
        each = _per_sender(bench, rate)
        async with bench.fresh() as stack, bench.connected(stack.database_url) as connection:
            ids = await add_senders(connection, _SENDERS)
            start = await _in_seconds(connection, lead)
            spacing = timedelta(seconds=_SENDERS / rate)
            await add_jobs(connection, ids, each, start=start, spacing=spacing)
            await connection.execute("ANALYZE")
            with stack.process("dispatcher", **settings_for(50)):
                await watch(bench, stack.database_url, SENT, each * _SENDERS, stack.stores)
            figures |= await _figures(connection, _OURS, rate)
    return figures


async def _bullmq(bench: Bench, number: int) -> Figures:
    del number
    figures: dict[str, float] = {}
    for rate in _RATES:
        mails = _per_sender(bench, rate) * _SENDERS
        async with bench.connected(bench.servers.postgres.url("postgres")) as connection:
            start = await _in_seconds(connection, await bench.lead_s() + mails / 2_000)
        every = timedelta(seconds=1 / rate)
        async with (
            rival_queue(
                bench, BULLMQ, mails=mails, senders=_SENDERS, start=start, every=every
            ) as queue,
            bench.connected(queue.database_url) as connection,
        ):
            with queue.worker(50):
                stores = {"redis": bench.servers.valkey.child.pid}
                await watch(bench, queue.database_url, SENT_BY_RIVAL, mails, stores)
            figures |= await _figures(connection, _THEIRS, rate)
    return figures


async def _in_seconds(connection: Connection, seconds: float) -> Any:
    cursor = await connection.execute("SELECT now() + %s", [timedelta(seconds=seconds)])
    row = await cursor.fetchone()
    return None if row is None else row[0]


async def block(connection: Connection, ids: list[int]) -> None:
    """Use up the hourly limit of senders."""
    for statement in _BLOCK:
        await connection.execute(statement.encode(), {"ids": ids})


async def commands(redis: Redis) -> int:
    """Return the number of commands that Redis has run, those of scripts included."""
    found: dict[str, Any] = await redis.info("commandstats")
    return sum(int(command["calls"]) for command in found.values())


async def _beside(bench: Bench, blocked: int) -> dict[str, float]:
    """Send the mail of others beside `blocked` blocked mails; return the lateness and the work."""
    lead = await bench.lead_s()
    async with (
        bench.fresh() as stack,
        bench.connected(stack.database_url) as connection,
        bench.redis() as redis,
    ):
        (sender,) = await add_senders(connection, 1, "blocked")
        await block(connection, [sender])
        past = await _in_seconds(connection, -60)
        await add_jobs(connection, [sender], blocked, start=past)
        others = await add_senders(connection, _OTHERS, "other")
        start = await _in_seconds(connection, lead)
        await add_jobs(connection, others, 1, start=start)
        await connection.execute("ANALYZE")
        with stack.process("dispatcher", **settings_for(50)):
            row = await (await connection.execute("SELECT now()")).fetchone()
            if row is None or start - row[0] < timedelta(seconds=1):
                raise RuntimeError("the dispatcher did not start in time")
            ready = start - row[0]
            await asyncio.sleep(ready.total_seconds() / 2)
            began = await commands(redis), await _rows_read(connection)
            limit = time.monotonic() + lead + 30
            while (found := await _last(connection, others))[0] < _OTHERS:
                if time.monotonic() > limit:
                    raise RuntimeError(
                        f"{found[0]} of {_OTHERS} mails were sent beside the blocked"
                    )
                await asyncio.sleep(0.2)
            # The counters of a session are visible a second later.
            await asyncio.sleep(2)
            ended = await commands(redis), await _rows_read(connection)
    return {
        "last_ms": found[1],
        "redis_commands": ended[0] - began[0],
        "rows_read": ended[1] - began[1],
    }


async def _last(connection: Connection, senders: list[int]) -> tuple[int, float]:
    row = await (await connection.execute(_LAST, [senders])).fetchone()
    return (0, 0.0) if row is None else (row[0], float(row[1] or 0))


async def _rows_read(connection: Connection) -> float:
    row = await (await connection.execute(_READ)).fetchone()
    return float(row[0] or 0) if row else 0.0


async def _many(bench: Bench, number: int) -> Figures:
    del number
    return await _beside(bench, bench.size.hundredth)


async def _few(bench: Bench, number: int) -> Figures:
    del number
    return await _beside(bench, 100)


_MANY, _FEW = OUTBOX, f"{OUTBOX}, 100 blocked mails"
ROWS: Final = (
    BenchRow(
        "lateness",
        f"start of each mail after its due time, {_RATES[0]} and {_RATES[1]:,} due per second over "
        f"{_SENDERS} senders with a batch each, which no process has read before",
        {OUTBOX: _outbox, BULLMQ: _bullmq},
        (
            RatioTarget((OUTBOX, "p99_ms_200"), 10.0, most=1.0),
            RatioTarget((OUTBOX, "p99_ms_1000"), 30.0, most=1.0),
        ),
        size=lambda size: f"{size.seconds} s each",
        notes=(DOES_LESS[BULLMQ],),
    ),
    BenchRow(
        "fairness",
        f"mail of {_OTHERS} senders, all due at once, beside due mail of a sender at its limit; "
        "the work of both stores meanwhile",
        {_MANY: _many, _FEW: _few},
        (
            RatioTarget((_MANY, "last_ms"), 100.0, most=1.0),
            RatioTarget((_MANY, "redis_commands"), ((_FEW, "redis_commands"),), most=1.5),
            RatioTarget((_MANY, "rows_read"), ((_FEW, "rows_read"),), most=1.5),
        ),
        size=lambda size: f"{size.hundredth:,} blocked mails",
    ),
)
