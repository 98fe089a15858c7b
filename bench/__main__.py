"""`python -m bench`: prints a table and writes build/bench.json. All figures are from this run."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import grpc
import psycopg
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import batch_pb2, batch_service_pb2, sender_pb2, sender_service_pb2
from outbox.v1.batch_service_pb2_grpc import BatchServiceStub
from outbox.v1.sender_service_pb2_grpc import SenderServiceStub
from rich.console import Console
from rich.table import Table

from bench.healing import healing
from bench.hostile import PROMISED_STALL_MS, hostile
from bench.idle import SENDERS as WAITING_SENDERS
from bench.idle import idle
from bench.world import BenchStack, peak_memory_mib, world

USER = "bench"
SENDERS = 100
DISPATCHED = 30_000
UPLOADED = 1_000_000
DUE_A_SECOND, DUE_SECONDS = 200, 20
CHUNK = 64 * 1024
SUBJECT = "Your order {{ order }}"
BODY = "Dear {{ name }},\n\nyour order {{ order }} leaves {{ city }} today.\n\nThe shop\n"
HTML = "<p>Dear {{ name }},</p><p>your order <b>{{ order }}</b> leaves {{ city }} today.</p>"


def _csv(rows: int, prefix: str) -> bytes:
    lines = ["email,name,order,city"]
    lines += [f"{prefix}{i}@example.net,Ann Example {i},{i:08},Springfield" for i in range(rows)]
    return ("\r\n".join(lines) + "\r\n").encode()


async def _senders(channel: grpc.aio.Channel, count: int) -> list[str]:
    stub = SenderServiceStub(channel)
    answers = [
        await stub.CreateSender(
            sender_service_pb2.CreateSenderRequest(
                user_id=USER,
                sender=sender_pb2.Sender(
                    email=f"sender{i}@example.com", hourly_limit=1_000_000, max_in_flight=20
                ),
            )
        )
        for i in range(count)
    ]
    return [answer.sender_id for answer in answers]


def _options(sender_id: str, start: datetime, spacing: timedelta) -> batch_pb2.BatchOptions:
    schedule_time, duration = Timestamp(), Duration()
    schedule_time.FromDatetime(start)
    duration.FromTimedelta(spacing)
    return batch_pb2.BatchOptions(
        request_id=str(uuid.uuid4()),
        user_id=USER,
        sender_id=sender_id,
        subject=SUBJECT,
        body=BODY,
        html=HTML,
        schedule_time=schedule_time,
        spacing=duration,
    )


async def _upload(
    channel: grpc.aio.Channel, options: batch_pb2.BatchOptions, csv: bytes
) -> batch_service_pb2.ScheduleBatchResponse:
    async def parts() -> AsyncIterator[batch_service_pb2.UploadBatchRequest]:
        yield batch_service_pb2.UploadBatchRequest(options=options)
        for start in range(0, len(csv), CHUNK):
            yield batch_service_pb2.UploadBatchRequest(chunk=csv[start : start + CHUNK])

    return await BatchServiceStub(channel).UploadBatch(parts())


async def intake(stack: BenchStack) -> dict[str, float]:
    """Upload one CSV and cancel its batch: rows per second, peak memory of the scheduler, s."""
    csv = _csv(UPLOADED, "r")
    with stack.process("scheduler") as process:
        async with grpc.aio.insecure_channel(stack.scheduler) as channel:
            (sender,) = await _senders(channel, 1)
            later = datetime.now(UTC) + timedelta(days=30)
            started = time.perf_counter()
            answer = await _upload(channel, _options(sender, later, timedelta(0)), csv)
            took = time.perf_counter() - started
            started = time.perf_counter()
            cancelled = await BatchServiceStub(channel).CancelBatch(
                batch_service_pb2.CancelBatchRequest(batch_id=answer.batch.batch_id)
            )
            cancel_took = time.perf_counter() - started
        if cancelled.cancelled_count != UPLOADED:
            raise SystemExit(f"cancelled {cancelled.cancelled_count} of {UPLOADED}")
        if answer.batch.accepted_count != UPLOADED:
            raise SystemExit(f"accepted {answer.batch.accepted_count} of {UPLOADED}")
        return {
            "upload_rows": UPLOADED,
            "upload_rows_per_s": UPLOADED / took,
            "upload_peak_mib": peak_memory_mib(process),
            "cancel_million_s": cancel_took,
        }


async def _schedule(stack: BenchStack, rows: int, start: datetime, spacing: timedelta) -> None:
    """Give each sender the same number of rows; space their first mails evenly."""
    with stack.process("scheduler"):
        async with grpc.aio.insecure_channel(stack.scheduler) as channel:
            for i, sender in enumerate(await _senders(channel, SENDERS)):
                first = start + spacing * i / SENDERS
                await _upload(channel, _options(sender, first, spacing), _csv(rows, f"s{i}r"))


async def _until_sent(stack: BenchStack, total: int) -> None:
    async with await psycopg.AsyncConnection.connect(
        stack.servers.database_url, autocommit=True
    ) as connection:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            cursor = await connection.execute("SELECT count(*) FROM attempts WHERE outcome = 1")
            row = await cursor.fetchone()
            if row is not None and row[0] >= total:
                return
            await asyncio.sleep(0.5)
    raise SystemExit(f"not all of {total} mails were sent in two minutes")


async def _one_row(stack: BenchStack, query: str) -> tuple[float, ...]:
    async with await psycopg.AsyncConnection.connect(stack.servers.database_url) as connection:
        row = await (await connection.execute(query)).fetchone()
        if row is None:
            raise RuntimeError(query)
        return tuple(float(value) for value in row)


async def dispatch(stack: BenchStack, concurrency: int) -> dict[str, float]:
    """Measure mails per second: one dispatcher process, many senders, waiting mail, gap 0."""
    await _schedule(stack, DISPATCHED // SENDERS, datetime.now(UTC), timedelta(0))
    with stack.process("dispatcher", dispatcher_concurrency=str(concurrency)) as process:
        await _until_sent(stack, DISPATCHED)
        memory = peak_memory_mib(process)
    (rate,) = await _one_row(
        stack,
        "SELECT count(*) / extract(epoch FROM max(ended_at) - min(started_at)) FROM attempts",
    )
    return {
        f"dispatch_mails_per_s_concurrency_{concurrency}": rate,
        "dispatcher_peak_mib": memory,
    }


async def lateness(stack: BenchStack) -> dict[str, float]:
    """Measure the lateness in ms of each mail while 200 mails fall due per second."""
    total = DUE_A_SECOND * DUE_SECONDS
    spacing = timedelta(seconds=SENDERS / DUE_A_SECOND)
    start = datetime.now(UTC) + timedelta(seconds=15)
    await _schedule(stack, total // SENDERS, start, spacing)
    with stack.process("dispatcher", dispatcher_concurrency="20"):
        await _until_sent(stack, total)
    p50, p99, most = await _one_row(
        stack,
        """
        SELECT percentile_cont(0.50) WITHIN GROUP (ORDER BY late),
               percentile_cont(0.99) WITHIN GROUP (ORDER BY late), max(late)
        FROM (SELECT 1000 * extract(epoch FROM a.started_at - j.scheduled_at) AS late
              FROM attempts a JOIN email_jobs j ON j.id = a.email_job_id) AS each
        """,
    )
    return {"lateness_ms_p50": p50, "lateness_ms_p99": p99, "lateness_ms_max": most}


_ROWS: Final[Mapping[str, Callable[[BenchStack], Awaitable[dict[str, float]]]]] = {
    "intake": intake,
    "dispatch": lambda stack: dispatch(stack, 20),
    "lateness": lateness,
    "healing": healing,
    "hostile": hostile,
    "idle": lambda stack: idle(stack, WAITING_SENDERS[0]),
}


async def _measure(names: Sequence[str]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name in names:
        Console(stderr=True).print(f"{name} ...")
        with tempfile.TemporaryDirectory(prefix="outbox-bench-") as folder:
            async with world(Path(folder)) as stack:
                figures |= await _ROWS[name](stack)
    return figures


def main() -> int:
    """Measure the rows that are named, or all, and print them."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=main.__doc__)
    parser.add_argument("row", nargs="*", metavar="ROW", help=f"one of {', '.join(_ROWS)}")
    names = parser.parse_args().row or list(_ROWS)
    if unknown := [name for name in names if name not in _ROWS]:
        parser.error(f"no row {', '.join(unknown)}; the rows are {', '.join(_ROWS)}")
    figures = asyncio.run(_measure(names))
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.1f}")
    Console().print(table)
    target = Path("build/bench.json")
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    stall = figures.get("hostile_longest_stall_ms", 0)
    if stall > PROMISED_STALL_MS:
        Console(stderr=True).print(
            f"an event loop stalled for up to {stall:.0f} ms, more than {PROMISED_STALL_MS}; "
            "on a machine with other work, the time may be that of others"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
