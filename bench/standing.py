"""Rows about processes: their cost while nothing happens, their memory, and their start."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.backlog import FEW_SENDERS, until_loaded
from bench.bench import Bench
from bench.dispatching import settings_for
from bench.filling import add_jobs, add_senders
from bench.lateness import block
from bench.processor_time import memory_mib, processor_seconds
from bench.results import OUTBOX, Figures, RatioTarget
from bench.row import BenchRow
from bench.scheduling import a_month_later, create_senders, csv_of, options_of, upload
from bench.watching import SENT, watch
from bench.world import BenchStack

_SERVICES: Final = ("scheduler", "dispatcher", "stats")
_STORES: Final = ("postgresql", "redis")
_WATCHED_S: Final = 20
_SETTLED_S: Final = 5
_START_LIMIT_S: Final = 120
# Deletes the rows that the upload of a round left behind.
_FORGET: Final = (
    "DELETE FROM email_jobs WHERE batch_id = %(batch)s",
    "DELETE FROM batch_counts WHERE batch_id = %(batch)s",
    """
    DELETE FROM sender_counts AS c USING batches AS b
    WHERE b.id = %(batch)s AND c.sender_id = b.sender_id
    """,
    "DELETE FROM count_deltas WHERE batch_id = %(batch)s",
    "DELETE FROM batches WHERE id = %(batch)s",
)


@contextmanager
def _services(stack: BenchStack, **settings: str) -> Iterator[dict[str, int]]:
    """Run all services; yield their processes and those of the stores."""
    with ExitStack() as processes:
        found = {
            service: processes.enter_context(stack.process(service, **settings)).pid
            for service in _SERVICES
        }
        yield found | stack.stores


async def _idle(bench: Bench, number: int) -> Figures:
    """Measure the processor time with senders whose due mail waits for their hourly limits."""
    del number
    senders = bench.size.hundredth
    async with (
        bench.fresh() as stack,
        bench.connected(stack.database_url) as connection,
        bench.redis() as redis,
    ):
        ids = await add_senders(connection, senders)
        await block(connection, ids)
        row = await (await connection.execute("SELECT now() - interval '1 minute'")).fetchone()
        await add_jobs(connection, ids, 1, start=row[0] if row else None)
        await connection.execute("VACUUM ANALYZE")
        with _services(stack) as pids:
            await until_loaded(redis, senders)
            await asyncio.sleep(_SETTLED_S)
            before, began = processor_seconds(pids), time.monotonic()
            await asyncio.sleep(_WATCHED_S)
            after, took = processor_seconds(pids), time.monotonic() - began
        sent = await (await connection.execute(SENT.encode())).fetchone()
    if sent is None or sent[0] != senders:
        raise RuntimeError(
            f"{sent} attempts instead of {senders}: mail of blocked senders was sent"
        )
    figures = {f"{name}_percent": 100 * (after[name] - before[name]) / took for name in pids}
    return figures | {"most_percent": max(figures.values())}


async def _memory(bench: Bench, number: int) -> Figures:
    """Measure the memory of each service: idle, and while mail is sent and uploaded."""
    async with (
        bench.waiting(FEW_SENDERS, bench.size.jobs) as stack,
        bench.connected(stack.database_url) as connection,
        bench.redis() as redis,
    ):
        cursor = await connection.execute(
            "SELECT id FROM senders WHERE email LIKE 's%%' ORDER BY id LIMIT %s",
            [bench.size.senders],
        )
        ids = [row[0] for row in await cursor.fetchall()]
        # All services start, and their memory is read, before the mail is due.
        lead = 3 * await bench.lead_s() + 5
        row = await (
            await connection.execute("SELECT now() + make_interval(secs => %s)", [lead])
        ).fetchone()
        each = bench.size.mails // len(ids)
        before = await (await connection.execute(SENT.encode())).fetchone()
        sent_before = before[0] if before else 0
        name = f"memory{number}-"
        await add_jobs(connection, ids, each, start=row[0] if row else None, name=name)
        # The upload comes on top of the backlog of one user.
        quota = str(10 * bench.size.jobs)
        with _services(stack, user_waiting_jobs=quota, **settings_for(50)) as pids:
            await until_loaded(redis, FEW_SENDERS)
            await asyncio.sleep(2)
            services = {name: pids[name] for name in _SERVICES}
            idle = memory_mib(services)
            most = dict(idle)
            busy = asyncio.create_task(_upload(stack, bench.size.tenth))
            query = f"SELECT count(*) - {sent_before} FROM attempts WHERE outcome = 1"
            sending = asyncio.create_task(
                watch(bench, stack.database_url, query, each * len(ids), stack.stores)
            )
            while not (busy.done() and sending.done()):
                await asyncio.sleep(0.5)
                for service, mib in memory_mib(services).items():
                    most[service] = max(most[service], mib)
            await sending
            batch = await busy
        # The same jobs wait in the next round.
        for statement in _FORGET:
            await connection.execute(statement.encode(), {"batch": batch})
    figures = {f"{name}_idle_mib": mib for name, mib in idle.items()}
    figures |= {f"{name}_busy_mib": mib for name, mib in most.items()}
    return figures | {
        "most_idle_mib": max(idle.values()),
        "most_busy_mib": max(most.values()),
    }


async def _upload(stack: BenchStack, rows: int) -> int:
    """Upload rows for a new sender; return the batch."""
    csv = await asyncio.to_thread(csv_of, rows, "u")
    async with grpc.aio.insecure_channel(stack.scheduler) as channel:
        (sender,) = await create_senders(channel, 1)
        answer = await upload(channel, options_of(sender, a_month_later()), csv)
    return int(answer.batch.batch_id)


async def _start(bench: Bench, number: int) -> Figures:
    """Start `outbox up` twice in a folder; return how long the second start took."""
    del number, bench
    folder = Path(tempfile.mkdtemp(prefix="outbox-up-"))
    try:
        # The first start creates the data.
        first = await asyncio.to_thread(_until_all_serve, folder)
        second = await asyncio.to_thread(_until_all_serve, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"serving_s": second, "first_start_s": first}


def _until_all_serve(folder: Path) -> float:
    """Run `outbox up` until all services say SERVING, and stop it; return the seconds."""
    began = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "outbox_server.cli", "up", "-o", "json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OUTBOX_LOG_LEVEL": "warning"},
    )
    try:
        if child.stdout is None:
            raise RuntimeError("no output")
        text = b""
        while True:
            line = child.stdout.readline()
            if not line:
                said = child.stderr.read().decode() if child.stderr else ""
                raise RuntimeError(f"outbox up ended: {said}")
            text += line
            try:
                found = json.loads(text)
            except ValueError:
                continue
            break
        for address in (found["scheduler"], found["stats"], *found["dispatchers"]):
            with grpc.insecure_channel(address) as channel:
                answer = health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=10
                )
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                raise RuntimeError(f"{address} does not serve")
        return time.monotonic() - began
    finally:
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=_START_LIMIT_S)


ROWS: Final = (
    BenchRow(
        "idle",
        "processor time of each service and store, in percent of a core, while due mail of senders "
        "waits for their hourly limits",
        {OUTBOX: _idle},
        (RatioTarget((OUTBOX, "most_percent"), 1.0, most=1.0),),
        size=lambda size: f"{size.hundredth:,} blocked senders",
    ),
    BenchRow(
        "memory",
        "memory of each service with its workers (PSS): idle, and while mail is sent at "
        "concurrency 50, counted, and a tenth of the backlog is uploaded",
        {OUTBOX: _memory},
        (
            RatioTarget((OUTBOX, "most_idle_mib"), 100.0, most=1.0),
            RatioTarget((OUTBOX, "most_busy_mib"), 200.0, most=1.0),
        ),
        size=lambda size: f"{size.jobs:,} waiting jobs",
    ),
    BenchRow(
        "start",
        "`outbox up` on existing data until all services say SERVING",
        {OUTBOX: _start},
        (RatioTarget((OUTBOX, "serving_s"), 3.0, most=1.0),),
        size=lambda _: "the data of an earlier start",
    ),
)
