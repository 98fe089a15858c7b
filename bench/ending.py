"""Rows that cancel a tenth of the backlog: one batch, one sender, and the jobs of a filter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import grpc
from outbox.v1 import batch_service_pb2, email_job_service_pb2, sender_service_pb2
from outbox.v1.batch_service_pb2_grpc import BatchServiceStub
from outbox.v1.email_job_service_pb2_grpc import EmailJobServiceStub
from outbox.v1.sender_service_pb2_grpc import SenderServiceStub

from bench.backlog import FEW_SENDERS
from bench.bench import LARGE, Bench
from bench.results import OUTBOX, Figures, RatioTarget
from bench.row import BenchRow

_LIMIT_S: Final = 600.0
# The batches of the senders that nobody has used yet.
_UNUSED: Final = """
    SELECT b.id, b.sender_id FROM batches AS b JOIN senders AS s ON s.id = b.sender_id
    WHERE s.email LIKE %s AND b.state = 1 AND s.deleted_at IS NULL
    AND EXISTS (SELECT FROM email_jobs AS j WHERE j.batch_id = b.id AND j.state = 1)
    ORDER BY b.id LIMIT 1
"""
_UNSWEPT: Final = """
    SELECT (SELECT count(*) FROM batch_cancellations) + (SELECT count(*) FROM job_changes)
"""
_LEFT: Final = "SELECT count(*) FROM email_jobs WHERE batch_id = %s AND state = 1"


async def _end(
    bench: Bench, call: Callable[[grpc.aio.Channel, str, str], Awaitable[None]]
) -> Figures:
    async with (
        bench.waiting(FEW_SENDERS, bench.size.jobs) as stack,
        bench.connected(stack.database_url) as connection,
    ):
        row = await (await connection.execute(_UNUSED, [f"{LARGE}%"])).fetchone()
        if row is None:
            raise RuntimeError("no large batch is left: this row needs more jobs (--jobs)")
        with stack.process("scheduler"):
            async with grpc.aio.insecure_channel(stack.scheduler) as channel:
                began = time.perf_counter()
                await call(channel, str(row[0]), str(row[1]))
                answered = time.perf_counter() - began
                while (await (await connection.execute(_UNSWEPT)).fetchone() or [1])[0]:
                    if time.perf_counter() - began > _LIMIT_S:
                        raise RuntimeError("the rows were not cancelled in ten minutes")
                    await asyncio.sleep(0.02)
                swept = time.perf_counter() - began
        left = await (await connection.execute(_LEFT, [row[0]])).fetchone()
        if left is None or left[0]:
            raise RuntimeError(f"jobs still wait after the cancellation: {left}")
    return {"answer_s": answered, "all_rows_s": swept}


async def _cancel(bench: Bench, number: int) -> Figures:
    del number

    async def call(channel: grpc.aio.Channel, batch_id: str, sender_id: str) -> None:
        del sender_id
        answer = await BatchServiceStub(channel).CancelBatch(
            batch_service_pb2.CancelBatchRequest(batch_id=batch_id)
        )
        if answer.cancelled_count != bench.size.tenth:
            raise RuntimeError(f"cancelled {answer.cancelled_count} of {bench.size.tenth}")

    return await _end(bench, call)


async def _delete(bench: Bench, number: int) -> Figures:
    del number

    async def call(channel: grpc.aio.Channel, batch_id: str, sender_id: str) -> None:
        del batch_id
        await SenderServiceStub(channel).DeleteSender(
            sender_service_pb2.DeleteSenderRequest(sender_id=sender_id, force=True)
        )

    return await _end(bench, call)


async def _cancel_by_filter(bench: Bench, number: int) -> Figures:
    del number

    async def call(channel: grpc.aio.Channel, batch_id: str, sender_id: str) -> None:
        del sender_id
        stub = EmailJobServiceStub(channel)
        request = email_job_service_pb2.CancelEmailJobsRequest(
            batch_id=batch_id, filter="row_number > 0"
        )
        cancelled = 0
        while True:
            answer = await stub.CancelEmailJobs(request)
            cancelled += answer.cancelled_count
            request.page_token = answer.next_page_token
            if not request.page_token:
                break
        if cancelled != bench.size.tenth:
            raise RuntimeError(f"cancelled {cancelled} of {bench.size.tenth}")

    return await _end(bench, call)


_TARGETS: Final = (RatioTarget((OUTBOX, "answer_s"), 2.0, most=1.0),)
ROWS: Final = (
    BenchRow(
        "cancel_million",
        "CancelBatch until its answer, from which on no job of the batch is sent; and until each "
        "row says CANCELLED, which is written in parts and which nobody waits for",
        {OUTBOX: _cancel},
        _TARGETS,
        size=lambda size: f"{size.tenth:,} of {size.jobs:,} jobs",
    ),
    BenchRow(
        "cancel_filter_million",
        "CancelEmailJobs with a filter that is evaluated for each row, likewise, in some calls",
        {OUTBOX: _cancel_by_filter},
        _TARGETS,
        size=lambda size: f"{size.tenth:,} of {size.jobs:,} jobs",
    ),
    BenchRow(
        "delete_sender_million",
        "DeleteSender of a sender with one batch, likewise",
        {OUTBOX: _delete},
        _TARGETS,
        size=lambda size: f"{size.tenth:,} of {size.jobs:,} jobs",
    ),
)
