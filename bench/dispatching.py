"""Rows that send waiting mail as fast as possible, by Outbox and by its rivals."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Final

import grpc
from outbox.v1.email_job_event_service_pb2 import WatchEmailJobsRequest
from outbox.v1.email_job_event_service_pb2_grpc import EmailJobEventServiceStub

from bench.bench import Bench, Connection
from bench.filling import USER, add_jobs, add_senders
from bench.results import OUTBOX, Figures, RatioTarget, Source
from bench.rivals.contenders import BULLMQ, DOES_LESS, NAMES, rival_queue
from bench.rivals.contenders import SENT as SENT_BY_RIVAL
from bench.row import BenchRow, Measure
from bench.watching import SENT, watch
from bench.world import BenchStack, program

REMOTE_MS: Final = 25
_RATE: Final = "mails_per_s"
# With a gap of 0: at no time more sends of a sender than its `max_in_flight`, and one attempt per
# job.
_BROKEN: Final = """
    SELECT (SELECT count(*) - count(DISTINCT email_job_id) FROM attempts),
           (SELECT max(flying) FROM (
                SELECT sum(step) OVER (PARTITION BY sender_id ORDER BY at, step) AS flying
                FROM (SELECT sender_id, started_at AS at, 1 AS step FROM attempts
                      UNION ALL SELECT sender_id, ended_at, -1 FROM attempts) AS steps) AS each),
           (SELECT min(max_in_flight) FROM senders)
"""


async def fill_due(connection: Connection, senders: int, mails: int, *, in_s: float = -1.0) -> int:
    """Add mails that are due, the same number for each sender; return how many they are."""
    ids = await add_senders(connection, senders)
    cursor = await connection.execute("SELECT now() + make_interval(secs => %s)", [in_s])
    row = await cursor.fetchone()
    await add_jobs(connection, ids, mails // senders, start=row[0] if row else None)
    await connection.execute("ANALYZE")
    return mails // senders * senders


def settings_for(concurrency: int) -> dict[str, str]:
    """Return the settings of a dispatcher that sends this many mails at once to the relay."""
    return {"dispatcher_concurrency": str(concurrency), "smtp_pool": str(concurrency)}


async def outbox_dispatch(
    bench: Bench,
    concurrency: int,
    *,
    dispatchers: int = 1,
    smtp_port: int | None = None,
    events: bool = True,
    watched: bool = False,
) -> Figures:
    """Send waiting mail by one dispatcher, or several.

    Without `events`, no change is recorded. If it is `watched`, a caller reads all changes.
    """
    port = smtp_port or bench.smtp_port
    # Several must all be ready when the mail is due.
    in_s = dispatchers * await bench.lead_s() if dispatchers > 1 else -1.0
    async with bench.fresh() as stack:
        async with bench.connected(stack.database_url) as connection:
            if not events:
                await connection.execute("ALTER TABLE email_jobs DISABLE TRIGGER outbox_job_events")
            total = await fill_due(connection, bench.size.senders, bench.size.mails, in_s=in_s)
        async with AsyncExitStack() as processes:
            pids = stack.stores | ({"sink": bench.sink_pid} if smtp_port is None else {})
            if watched:
                pids["scheduler"] = await processes.enter_async_context(_watching(stack))
            for number in range(1, dispatchers + 1):
                process = processes.enter_context(
                    stack.process(
                        "dispatcher",
                        smtp_url=f"smtp://127.0.0.1:{port}",
                        **settings_for(concurrency),
                    )
                )
                pids["dispatcher" if number == 1 else f"dispatcher_{number}"] = process.pid
            figures = await watch(bench, stack.database_url, SENT, total, pids)
        await _check_limits(bench, stack)
    return figures


@asynccontextmanager
async def _watching(stack: BenchStack) -> AsyncIterator[int]:
    """Read all changes of jobs, as a caller of WatchEmailJobs; yield the scheduler's process id."""
    with stack.process("scheduler") as process:
        async with grpc.aio.insecure_channel(stack.scheduler) as channel:
            request = WatchEmailJobsRequest(user_id=USER)
            stream = EmailJobEventServiceStub(channel).WatchEmailJobs(request)
            # Its position, before any mail is sent.
            await stream.read()

            async def read_all() -> None:
                async for _ in stream:
                    pass

            reading = asyncio.create_task(read_all())
            try:
                yield process.pid
            finally:
                reading.cancel()
                await asyncio.wait([reading])


async def _check_limits(bench: Bench, stack: BenchStack) -> None:
    async with bench.connected(stack.database_url) as connection:
        row = await (await connection.execute(_BROKEN)).fetchone()
    if row is None or row[0] or row[1] > row[2]:
        raise RuntimeError(f"second attempts, most in flight of a sender, allowed: {row}")


async def rival_dispatch(
    bench: Bench, name: str, concurrency: int, *, smtp_port: int | None = None
) -> Figures:
    """Send waiting mail by a rival."""
    mails, senders = bench.size.mails, bench.size.senders
    async with rival_queue(bench, name, mails=mails, senders=senders, smtp_port=smtp_port) as queue:
        with queue.worker(concurrency) as pid:
            stores = {
                "postgresql": bench.servers.postgres.child.pid,
                "redis": bench.servers.valkey.child.pid,
            }
            pids = stores | {"dispatcher": pid}
            if smtp_port is None:
                pids["sink"] = bench.sink_pid
            return await watch(bench, queue.database_url, SENT_BY_RIVAL, mails, pids)


async def _contend(name: str, concurrency: int, bench: Bench, number: int) -> Figures:
    async def measure() -> Figures:
        if name == OUTBOX:
            return await outbox_dispatch(bench, concurrency)
        return await rival_dispatch(bench, name, concurrency)

    return await bench.once(("dispatch", name, concurrency, number), measure)


async def _remote(name: str, bench: Bench, number: int) -> Figures:
    del number
    argv = (sys.executable, "-m", "bench.delaying_proxy", str(bench.smtp_port), str(REMOTE_MS))
    with program(*argv) as (_, port):
        if name == OUTBOX:
            return await outbox_dispatch(bench, 100, smtp_port=port)
        return await rival_dispatch(bench, name, 100, smtp_port=port)


async def _some_dispatchers(dispatchers: int, bench: Bench, number: int) -> Figures:
    del number
    return await outbox_dispatch(bench, 50, dispatchers=dispatchers)


async def _with_events(events: bool, watched: bool, bench: Bench, number: int) -> Figures:
    del number
    return await outbox_dispatch(bench, 50, events=events, watched=watched)


def _all(concurrency: int) -> dict[str, Measure]:
    return {name: partial(_contend, name, concurrency) for name in (OUTBOX, *NAMES)}


def _rate_of(*names: str) -> tuple[Source, ...]:
    return tuple((name, _RATE) for name in names)


def _dispatch_row(concurrency: int) -> BenchRow:
    return BenchRow(
        f"dispatch_c{concurrency}",
        f"waiting mail, gap 0, at concurrency {concurrency}; us are processor time per mail",
        _all(concurrency),
        (
            RatioTarget((OUTBOX, _RATE), _rate_of(BULLMQ), least=3.0),
            RatioTarget((OUTBOX, _RATE), _rate_of(*NAMES), least=2.0),
        ),
        size=lambda size: f"{size.mails:,} mails of {size.senders:,} senders",
        notes=tuple(DOES_LESS.values()),
    )


_ONE, _TWO = "one dispatcher", "two dispatchers"
_RECORDED, _UNRECORDED, _WATCHED = "with events", "without events", "with events and a watch"
ROWS: Final = (
    _dispatch_row(5),
    _dispatch_row(50),
    BenchRow(
        "cpu_per_mail",
        "processor time per mail at concurrency 50",
        {name: partial(_contend, name, 50) for name in (OUTBOX, BULLMQ)},
        (
            RatioTarget((OUTBOX, "dispatcher_us"), 160.0, most=1.0),
            RatioTarget((OUTBOX, "postgresql_us"), 80.0, most=1.0),
            RatioTarget((OUTBOX, "redis_us"), 40.0, most=1.0),
        ),
        size=lambda size: f"{size.mails:,} mails of {size.senders:,} senders",
        notes=(DOES_LESS[BULLMQ],),
    ),
    BenchRow(
        "dispatch_remote",
        f"waiting mail to a server that is {REMOTE_MS} ms away, by 100 connections",
        {name: partial(_remote, name) for name in (OUTBOX, BULLMQ)},
        (RatioTarget((OUTBOX, _RATE), _rate_of(BULLMQ), least=2.0),),
        size=lambda size: f"{size.mails:,} mails of {size.senders:,} senders",
        notes=(DOES_LESS[BULLMQ], "the delay is that of bench.delaying_proxy, on the same machine"),
    ),
    BenchRow(
        "dispatch_two",
        "two dispatchers of concurrency 50 instead of one; no sender exceeds its max_in_flight, "
        "and no job has two attempts",
        {_ONE: partial(_some_dispatchers, 1), _TWO: partial(_some_dispatchers, 2)},
        (RatioTarget((_TWO, _RATE), ((_ONE, _RATE),), least=1.3),),
        size=lambda size: f"{size.mails:,} mails of {size.senders:,} senders",
    ),
    BenchRow(
        "events",
        "waiting mail at concurrency 50, with every change recorded for WatchEmailJobs, with the "
        "trigger that does so switched off, and with a caller that reads all changes meanwhile",
        {
            _RECORDED: partial(_with_events, True, False),
            _UNRECORDED: partial(_with_events, False, False),
            _WATCHED: partial(_with_events, True, True),
        },
        (
            RatioTarget((_RECORDED, _RATE), ((_UNRECORDED, _RATE),), least=0.9),
            RatioTarget((_WATCHED, _RATE), ((_RECORDED, _RATE),), least=0.9),
        ),
        size=lambda size: f"{size.mails:,} mails of {size.senders:,} senders",
    ),
)
