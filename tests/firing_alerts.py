"""`python -m tests.firing_alerts`: makes every alert fire, in a real Prometheus, by real trouble.

It starts the stack of a drill in its production configuration, with load, and a Prometheus with our
rules, in which a minute is a second. For each trouble it waits until the expected alerts fire,
undoes the trouble, and waits until they are resolved. A trouble that had too little effect, as on a
busy machine, is made again. Debian's package prometheus is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, LiteralString

import psycopg
import redis.asyncio
from psycopg import sql
from redis.exceptions import RedisError

from outbox_server.deploy.drill.drill import DrillFolder
from outbox_server.deploy.drill.run import Drill
from outbox_server.deploy.drill.stack import DrillStack, Size, drill_settings
from outbox_server.deploy.drill.waiting import until
from outbox_server.shared.holds.requesting import request_hold
from outbox_server.shared.settings import load_settings
from tests.prometheus import Prometheus

_RULES: Final = Path(__file__).parents[1] / "deploy" / "prometheus" / "outbox.rules.yml"
_SIZE: Final = Size(dispatchers=2, schedulers=2, stats=2)
# So many times faster than in production.
_FASTER: Final = 60
_SECONDS: Final = {"m": 60, "h": 3600}
_FIRES_WITHIN_S: Final = 120.0
# The slowest rule looks back six hours, which are six minutes here.
_RESOLVED_WITHIN_S: Final = 420.0
# Until a trouble has had its effect.
_EFFECT_WITHIN_S: Final = 60.0
# How often a trouble is made until all of its alerts have fired.
_TRIES: Final = 3
_PAUSE_S: Final = 0.25
# The drill's load has up to 200 waiting jobs.
_MANY_LATE: Final = 150
# The alert needs four lost leases. Two dispatchers hold about as many each.
_MANY_LEASES: Final = 10
# The number of changes above which OutboxDeltasNotFolded needs no growth.
_MANY_DELTAS: Final = 100_000

Say = Callable[[str], None]
Trouble = Callable[[DrillStack], contextlib.AbstractAsyncContextManager[None]]


def compressed(rules: str) -> str:
    """Return the rules with each duration divided: 5m becomes 5s."""

    def shorter(found: re.Match[str]) -> str:
        seconds = int(found[2]) * _SECONDS[found[3]] / _FASTER
        return f"{found[1]}{seconds:g}s"

    return re.sub(r"(\[|for: )(\d+)([mh])\b", shorter, rules)


def _prometheus(folder: Path, stack: DrillStack) -> Prometheus:
    """Return a Prometheus that scrapes all processes of a stack, with faster rules."""
    targets: dict[str, list[str]] = {}
    for service in stack.system.services:
        targets.setdefault(f"outbox-{service.name}", []).append(service.metrics)
    jobs = [
        {"job_name": job, "static_configs": [{"targets": found}]} for job, found in targets.items()
    ]
    return Prometheus(folder, jobs, compressed(_RULES.read_text()))


async def _firing(prometheus: Prometheus) -> dict[str, str]:
    """Return the summaries of the alerts that fire, as soon as Prometheus answers."""
    while True:
        try:
            alerts = (await prometheus.get("alerts"))["alerts"]
        except OSError:
            await asyncio.sleep(_PAUSE_S)
            continue
        return {
            alert["labels"]["alertname"]: alert["annotations"]["summary"]
            for alert in alerts
            if alert["state"] == "firing"
        }


@asynccontextmanager
async def _again_and_again(act: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Do the same over and over, also if it fails because a store is away or answers late."""

    over = False

    async def repeat() -> None:
        while not over:
            with contextlib.suppress(OSError, RedisError, psycopg.Error):
                await act()
            await asyncio.sleep(_PAUSE_S)

    repeating = asyncio.create_task(repeat())
    try:
        yield
    finally:
        # Clients of stores may turn a cancellation into an error of theirs.
        over = True
        repeating.cancel()
        await asyncio.wait({repeating})


@asynccontextmanager
async def _refused(stack: DrillStack, server: str) -> AsyncIterator[None]:
    stack.proxies[server].refuse()
    try:
        yield
    finally:
        stack.proxies[server].heal()


@asynccontextmanager
async def _dispatchers_stopped(stack: DrillStack) -> AsyncIterator[None]:
    stopped = [one for one in stack.system.services if one.name == "dispatcher"]
    for service in stopped:
        service.child.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for service in stopped:
            service.child.signal(signal.SIGCONT)


@asynccontextmanager
async def _dispatchers_sleep_again_and_again(stack: DrillStack) -> AsyncIterator[None]:
    """Mail is late and event loops stall: dispatchers sleep until most mail is late."""

    async def sleep() -> None:
        async with _dispatchers_stopped(stack):
            await _until_jobs(
                stack, _MANY_LATE, "state = 1 AND scheduled_at < now() - interval '6 s'"
            )
        arrived = len(stack.inbox.mails)

        async def some_sent() -> bool:
            return len(stack.inbox.mails) >= arrived + _MANY_LATE // 2

        await until(some_sent, _EFFECT_WITHIN_S)

    async with _again_and_again(sleep):
        yield


async def _until_jobs(stack: DrillStack, least: int, condition: LiteralString) -> None:
    """Wait until this many jobs fulfil a condition in SQL."""
    url = stack.system.servers.database_url
    query = sql.SQL("SELECT count(*) >= %s FROM email_jobs WHERE ") + sql.SQL(condition)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:

        async def enough() -> bool:
            row = await (await connection.execute(query, [least])).fetchone()
            return row is not None and bool(row[0])

        await until(enough, _EFFECT_WITHIN_S)


@asynccontextmanager
async def _a_dispatcher_dies_again_and_again(stack: DrillStack) -> AsyncIterator[None]:
    """The mail servers are slow meanwhile, so that it holds a lease in every slot."""
    slow = [stack.proxies[name] for name in ("smtp", "endpoint")]

    async def kill() -> None:
        service = stack.service("dispatcher", 1)
        # Both dispatchers, of which one dies, are sending.
        await until(service.serving, _EFFECT_WITHIN_S)
        await _until_jobs(stack, _MANY_LEASES, "state = 2 AND lease_until > now()")
        dead = service.child.pid
        service.child.signal(signal.SIGKILL)

        async def again() -> bool:
            return service.child.pid != dead

        await until(again, _EFFECT_WITHIN_S)

    for proxy in slow:
        proxy.lag(0.3)
    try:
        async with _again_and_again(kill):
            yield
    finally:
        for proxy in slow:
            proxy.heal()


@asynccontextmanager
async def _redis_flushed_again_and_again(stack: DrillStack) -> AsyncIterator[None]:
    async with redis.asyncio.Redis.from_url(stack.valkey.url) as client:

        async def rebuilt() -> bool:
            return bool([key async for key in client.scan_iter("outbox:*:generation")])

        async def flush() -> None:
            await until(rebuilt, _EFFECT_WITHIN_S)
            await client.flushall()

        async with _again_and_again(flush):
            yield


@asynccontextmanager
async def _redis_full_and_empty(stack: DrillStack) -> AsyncIterator[None]:
    async with redis.asyncio.Redis.from_url(stack.valkey.url) as client:
        await client.config_set("maxmemory", 1)
        await client.flushall()
        try:
            yield
        finally:
            await client.config_set("maxmemory", 0)


@asynccontextmanager
async def _nothing_folds(stack: DrillStack) -> AsyncIterator[None]:
    """The table that folds write is locked. The added changes cancel out."""
    url = stack.system.servers.database_url
    connect = psycopg.AsyncConnection.connect
    async with await connect(url) as locking, await connect(url, autocommit=True) as adding:
        await locking.execute("LOCK TABLE sender_counts IN SHARE MODE")
        await adding.execute(
            "INSERT INTO count_deltas (sender_id, batch_id, hour, state, n)"
            " SELECT id, 1, date_trunc('hour', now()), 3, n"
            " FROM (SELECT min(id) AS id FROM senders) AS one, generate_series(1, %s) AS i,"
            " (VALUES (1), (-1)) AS signs (n)",
            [_MANY_DELTAS],
        )
        try:
            yield
        finally:
            await locking.rollback()


@asynccontextmanager
async def _held(stack: DrillStack) -> AsyncIterator[None]:
    """An operator holds the installation."""
    url = stack.system.servers.database_url
    await request_hold(load_settings(database_url=url))
    try:
        yield
    finally:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            await connection.execute("DELETE FROM hold")


# Each trouble with the alerts that it must make fire.
TROUBLES: Final[tuple[tuple[str, Trouble, tuple[str, ...]], ...]] = (
    (
        "the dispatchers sleep, with SIGSTOP, until mail is late, again and again",
        _dispatchers_sleep_again_and_again,
        (
            "OutboxLatenessBurnsFast",
            "OutboxLatenessBurnsSlowly",
            "OutboxEventLoopStalled",
        ),
    ),
    (
        "a dispatcher is killed whenever it holds leases",
        _a_dispatcher_dies_again_and_again,
        ("OutboxLeasesLost",),
    ),
    ("the dispatchers stop, with SIGSTOP", _dispatchers_stopped, ("OutboxProcessDown",)),
    (
        "Redis refuses connections",
        lambda stack: _refused(stack, "redis"),
        ("OutboxStoreUnreachable", "OutboxServiceDown"),
    ),
    (
        "Redis is emptied whenever it is rebuilt",
        _redis_flushed_again_and_again,
        ("OutboxRebuildLoop",),
    ),
    ("Redis is empty and out of memory", _redis_full_and_empty, ("OutboxShardIncomplete",)),
    ("the mail server refuses connections", lambda s: _refused(s, "smtp"), ("OutboxCircuitOpen",)),
    (
        "PostgreSQL refuses connections",
        lambda stack: _refused(stack, "postgres"),
        ("OutboxCallsFail", "OutboxDueJobWaits"),
    ),
    ("nothing can fold the counts", _nothing_folds, ("OutboxDeltasNotFolded",)),
    ("the installation is held", _held, ("OutboxHeld",)),
)


async def _watch(prometheus: Prometheus, seen: dict[str, str], say: Say) -> None:
    """Note every alert that fires, and say so when one begins or ends."""
    before: set[str] = set()
    while True:
        now = await _firing(prometheus)
        for name in sorted(now.keys() - before):
            say(f"    fires     {name}: {now[name]}")
        for name in sorted(before - now.keys()):
            say(f"    resolved  {name}")
        before = set(now)
        seen |= now
        await asyncio.sleep(_PAUSE_S)


async def _make_fire(
    stack: DrillStack, prometheus: Prometheus, trouble: Trouble, expected: Collection[str]
) -> list[str]:
    """Make trouble until the alerts have fired; return what did not happen, one per line."""
    fired: set[str] = set()

    async def all_fired() -> bool:
        fired.update(await _firing(prometheus))
        return fired.issuperset(expected)

    async def all_resolved() -> bool:
        return not (await _firing(prometheus)).keys() & set(expected)

    for _ in range(_TRIES):
        with contextlib.suppress(TimeoutError):
            async with trouble(stack):
                await until(all_fired, _FIRES_WITHIN_S)
        if fired.issuperset(expected):
            break
    wrong = [f"{name} did not fire" for name in expected if name not in fired]
    try:
        await until(all_resolved, _RESOLVED_WITHIN_S)
    except TimeoutError:
        wrong.append(f"{', '.join(expected)}: not all were resolved")
    return wrong


async def fire_all(folder: Path, only: set[str], say: Say) -> tuple[dict[str, str], list[str]]:
    """Return the summaries of all alerts that fired, and what did not happen as expected."""
    async with AsyncExitStack() as open_:
        stack = DrillStack(folder, _SIZE, drill_settings("resend"), lambda _: None, production=True)
        await open_.enter_async_context(stack)
        prometheus = await open_.enter_async_context(_prometheus(folder / "prometheus", stack))
        drill = Drill(stack, seed=1, names=[], seconds=3600, say=lambda _: None)
        over = asyncio.Event()
        running = asyncio.create_task(drill.run(over))
        seen: dict[str, str] = {}
        wrong: list[str] = []
        watching = asyncio.create_task(_watch(prometheus, seen, say))
        try:
            await until(lambda: _mail_arrived(stack), 120)
            for text, trouble, expected in TROUBLES:
                if not only or only & set(expected):
                    say(text)
                    found = await _make_fire(stack, prometheus, trouble, expected)
                    wrong += [f"{line}: {text}" for line in found]
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            stack.heal()
            over.set()
            await running
        return seen, wrong


async def _mail_arrived(stack: DrillStack) -> bool:
    return bool(stack.inbox.mails)


def main(arguments: list[str]) -> int:
    """Run it; return 0 if every alert fired and was resolved."""
    parser = argparse.ArgumentParser(prog="python -m tests.firing_alerts", description=__doc__)
    parser.add_argument("alerts", nargs="*", help="only these alerts (default: all)")
    only = set(parser.parse_args(arguments).alerts)
    known = {name for *_, expected in TROUBLES for name in expected}
    if only - known:
        parser.error(f"there is no alert {min(only - known)}; there are {sorted(known)}")
    started = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - started:7.1f} s  {text}\n")

    with DrillFolder() as folder:
        seen, wrong = asyncio.run(fire_all(folder.path, only, say))
    for name in sorted(seen):
        sys.stdout.write(f"{name}: {seen[name]}\n")
    asked = only or known
    sys.stdout.write(f"{len(seen.keys() & asked)} of {len(asked)} alerts fired\n")
    for line in wrong:
        sys.stdout.write(f"WRONG: {line}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
