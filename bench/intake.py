"""Rows that give mail to Outbox: one large upload, and many small calls."""

from __future__ import annotations

import asyncio
import time
from statistics import quantiles
from typing import Final

import grpc
from outbox.v1 import batch_pb2, batch_service_pb2
from outbox.v1.batch_service_pb2_grpc import BatchServiceStub

from bench.bench import Bench
from bench.filling import add_jobs, add_senders
from bench.results import OUTBOX, Figures, RatioTarget
from bench.rivals.contenders import BULLMQ, add_bulk
from bench.row import BenchRow
from bench.scheduling import a_month_later, create_senders, csv_of, options_of, upload
from bench.world import peak_memory_mib

_CLIENTS: Final = 16
_COPY: Final = "bare COPY"
COPIED: Final = """
    COPY (SELECT id + 100000000, batch_id, sender_id, scheduled_at, row_number, recipient, variables
          FROM email_jobs) TO STDOUT
"""
COPY_INTO: Final = """
    COPY email_jobs (id, batch_id, sender_id, scheduled_at, row_number, recipient, variables)
    FROM STDIN
"""


async def _upload(bench: Bench, number: int) -> Figures:
    del number
    rows = bench.size.tenth
    csv = csv_of(rows, "r")
    async with bench.fresh() as stack:
        with stack.process("scheduler") as process:
            async with grpc.aio.insecure_channel(stack.scheduler) as channel:
                (sender,) = await create_senders(channel, 1)
                began = time.perf_counter()
                answer = await upload(channel, options_of(sender, a_month_later()), csv)
                took = time.perf_counter() - began
            if answer.batch.accepted_count != rows:
                raise RuntimeError(f"accepted {answer.batch.accepted_count} of {rows}")
            return {"rows_per_s": rows / took, "peak_mib": peak_memory_mib(process)}


async def _copy(bench: Bench, number: int) -> Figures:
    """COPY the same rows, prepared, into the same table with its indexes."""
    del number
    rows = bench.size.tenth
    async with bench.fresh() as stack, bench.connected(stack.database_url) as connection:
        ids = await add_senders(connection, 1)
        await add_jobs(connection, ids, rows, start=a_month_later())
        async with connection.cursor().copy(COPIED) as copy:
            prepared = b"".join([bytes(part) async for part in copy])
        await connection.execute("TRUNCATE email_jobs")
        began = time.perf_counter()
        async with connection.cursor().copy(COPY_INTO) as copy:
            for first in range(0, len(prepared), 256 * 1024):
                await copy.write(prepared[first : first + 256 * 1024])
        return {"rows_per_s": rows / (time.perf_counter() - began)}


async def _add_bulk(bench: Bench, number: int) -> Figures:
    del number
    async with bench.redis() as redis:
        await redis.flushall()
    env = {"REDIS_URL": bench.servers.redis_url, "ROWS": str(bench.size.tenth)}
    found = await add_bulk(bench, env)
    async with bench.redis() as redis:
        await redis.flushall()
    return {"rows_per_s": found["count"] / found["seconds"]}


async def _small(bench: Bench, number: int) -> Figures:
    del number
    figures: dict[str, float] = {}
    async with bench.fresh() as stack:
        with stack.process("scheduler"):
            async with grpc.aio.insecure_channel(stack.scheduler) as channel:
                senders = await create_senders(channel, _CLIENTS)
                for rows in (1, 10):
                    calls = bench.size.calls
                    # So that connections and caches exist before anything is measured.
                    await _call(stack.scheduler, senders, rows, _CLIENTS * 2)
                    began = time.perf_counter()
                    times, refused = await _call(stack.scheduler, senders, rows, calls)
                    took = time.perf_counter() - began
                    figures[f"calls_per_s_{rows}"] = len(times) / took
                    figures[f"p99_ms_{rows}"] = 1000 * quantiles(times, n=100)[98]
                    figures[f"refused_{rows}"] = refused
    return figures


async def _call(address: str, senders: list[str], rows: int, calls: int) -> tuple[list[float], int]:
    """Schedule batches with one client per sender; return the seconds of each call.

    Also returns how many calls were refused because the server had too many; they are repeated.
    """
    times: list[float] = []
    refused = 0

    async def client(sender: str) -> None:
        nonlocal refused
        async with grpc.aio.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            stub = BatchServiceStub(channel)
            for _ in range(calls // len(senders)):
                request = batch_service_pb2.ScheduleBatchRequest(
                    options=options_of(sender, a_month_later()),
                    recipients=batch_pb2.Recipients(
                        rows=[
                            batch_pb2.Recipient(
                                email=f"r{n}@example.net",
                                columns={
                                    "name": f"Ann Example {n}",
                                    "order": f"{n:08}",
                                    "city": "Springfield",
                                },
                            )
                            for n in range(rows)
                        ]
                    ),
                )
                began = time.perf_counter()
                while True:
                    try:
                        await stub.ScheduleBatch(request)
                        break
                    except grpc.aio.AioRpcError as error:
                        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                            raise
                        refused += 1
                times.append(time.perf_counter() - began)

    async with asyncio.TaskGroup() as group:
        for sender in senders:
            group.create_task(client(sender))
    return times, refused


ROWS: Final = (
    BenchRow(
        "intake_upload",
        "one upload of rows with five columns",
        {OUTBOX: _upload, f"{BULLMQ} addBulk": _add_bulk, _COPY: _copy},
        (
            RatioTarget((OUTBOX, "rows_per_s"), ((f"{BULLMQ} addBulk", "rows_per_s"),), least=6.0),
            RatioTarget((OUTBOX, "rows_per_s"), ((_COPY, "rows_per_s"),), least=0.6),
        ),
        size=lambda size: f"{size.tenth:,} rows",
        notes=(
            "BullMQ addBulk: checks no address, and stores the rows in Redis without fsync",
            "bare COPY: the same rows, prepared beforehand, into the same table with its indexes",
        ),
    ),
    BenchRow(
        "intake_small",
        f"ScheduleBatch with 1 row and with 10, by {_CLIENTS} clients at once; the clients are one "
        "Python process on the same machine",
        {OUTBOX: _small},
        (
            RatioTarget((OUTBOX, "calls_per_s_1"), 500.0, least=1.0),
            RatioTarget((OUTBOX, "calls_per_s_10"), 500.0, least=1.0),
            RatioTarget((OUTBOX, "p99_ms_1"), 100.0, most=1.0),
            RatioTarget((OUTBOX, "p99_ms_10"), 100.0, most=1.0),
        ),
        size=lambda size: f"{size.calls:,} calls each",
    ),
)
