"""`python -m bench.idle`: what waiting senders cost while nothing is due, and how soon they return.

The senders of one installation wait; the processor time of each process and the commands of Redis
are counted. Then Redis is emptied while a few of the senders have a due mail.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import psycopg
from redis.asyncio import Redis

from bench.world import BenchStack, world

SENDERS: Final = (20_000, 100_000)
# Senders with a due job when Redis is emptied. They have the last ids.
DUE: Final = 200
_WATCHED_S: Final = 20
_LIMIT_S: Final = 300.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")

# Each sender has one job for the next month.
_FILL: Final = (
    """
    INSERT INTO senders (user_id, email, hourly_limit)
    SELECT 'bench', 's' || i || '@example.com', 1000000 FROM generate_series(1, %(senders)s) AS i
    """,
    """
    INSERT INTO batches (user_id, sender_id, request_id, request_hash, subject, body, start_at,
                         duplicates, mode, accepted_count)
    SELECT user_id, id, 'r' || id, '\\x00', 'Mail', 'Hello', now(), 1, 1, 1 FROM senders
    """,
    """
    INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient)
    SELECT id, sender_id, now() + interval '30 days', 1, 'r' || id || '@example.net' FROM batches
    """,
)
_NOW_DUE: Final = """
    UPDATE email_jobs SET scheduled_at = now() - interval '1 second'
    WHERE sender_id IN (SELECT id FROM senders ORDER BY id DESC LIMIT %s)
"""
_SENT: Final = """
    SELECT count(*) AS sent, extract(epoch FROM min(started_at) - %(lost)s) AS first,
           extract(epoch FROM max(started_at) - %(lost)s) AS last
    FROM attempts WHERE started_at > %(lost)s
"""


def _cpu_s(pid: int) -> float:
    """Return the processor time that a process and its children have used."""
    used = 0.0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:
            continue
        if int(folder.name) == pid:
            used += sum(map(int, fields[11:15])) / _TICKS
        elif int(fields[1]) == pid:
            used += sum(map(int, fields[11:13])) / _TICKS
    return used


async def _commands(redis: Redis) -> int:
    """Return the number of commands that Redis has run, those of scripts included."""
    found: dict[str, Any] = await redis.info("commandstats")
    return sum(int(command["calls"]) for command in found.values())


async def _until_complete(redis: Redis, senders: int) -> float:
    """Return the seconds until a rebuild has ended, and has loaded all senders."""
    started = time.monotonic()
    while not await redis.exists("outbox:{0}:generation"):
        if time.monotonic() - started > _LIMIT_S:
            raise SystemExit(f"Redis was not rebuilt within {_LIMIT_S:.0f} s")
        await asyncio.sleep(0.02)
    took = time.monotonic() - started
    if await redis.zcard("outbox:{0}:ready") < senders - DUE:
        raise SystemExit("the rebuild has not loaded all senders")
    return took


async def idle(stack: BenchStack, senders: int) -> dict[str, float]:
    """Measure the cost of `senders` waiting senders, and a rebuild of them; some are due then."""
    name = f"{senders // 1000}k"
    async with (
        await psycopg.AsyncConnection.connect(stack.database_url, autocommit=True) as connection,
        Redis.from_url(stack.servers.redis_url) as redis,
    ):
        for statement in _FILL:
            await connection.execute(statement, {"senders": senders})
        await connection.execute("VACUUM ANALYZE")
        with stack.process("dispatcher", dispatcher_concurrency="20") as dispatcher:
            await _until_complete(redis, senders)
            pids = {
                "dispatcher": dispatcher.pid,
                "postgresql": stack.servers.postgres.child.pid,
                "redis": stack.servers.valkey.child.pid,
            }
            await asyncio.sleep(5)
            before = {part: _cpu_s(pid) for part, pid in pids.items()}
            commands, began = await _commands(redis), time.monotonic()
            await asyncio.sleep(_WATCHED_S)
            took = time.monotonic() - began
            cost = {
                f"idle_{name}_{part}_percent_of_a_core": 100 * (_cpu_s(pid) - before[part]) / took
                for part, pid in pids.items()
            }
            cost[f"idle_{name}_redis_commands_per_s"] = (await _commands(redis) - commands) / took
            before = {part: _cpu_s(pid) for part, pid in pids.items()}
            rebuilt = await _rebuild(connection, redis, name, senders)
            used = {
                f"rebuild_{name}_{part}_cpu_s": _cpu_s(pid) - before[part]
                for part, pid in pids.items()
            }
            return cost | rebuilt | used


async def _rebuild(
    connection: psycopg.AsyncConnection[Any], redis: Redis, name: str, senders: int
) -> dict[str, float]:
    # In one transaction, and Redis is emptied right after it: nobody loads them in between.
    await connection.execute(_NOW_DUE, (DUE,))
    cursor = await connection.execute("SELECT clock_timestamp()")
    row = await cursor.fetchone()
    if row is None:
        raise RuntimeError("PostgreSQL has no time")
    await redis.flushall()
    complete = await _until_complete(redis, senders)
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        found = await (await connection.execute(_SENT, {"lost": row[0]})).fetchone()
        if found is not None and found[0] == DUE:
            return {
                f"rebuild_{name}_first_send_s": float(found[1]),
                f"rebuild_{name}_all_due_sent_s": float(found[2]),
                f"rebuild_{name}_complete_s": complete,
            }
        await asyncio.sleep(0.1)
    raise SystemExit("not all due mails were sent")


async def _measure(numbers: list[int]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for senders in numbers:
        with tempfile.TemporaryDirectory(prefix="outbox-bench-") as folder:
            async with world(Path(folder)) as stack:
                figures |= await idle(stack, senders)
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--senders", type=int, nargs="+", default=list(SENDERS))
    print(json.dumps(asyncio.run(_measure(parser.parse_args().senders)), indent=2))


if __name__ == "__main__":
    main()
