"""Rows that read: counts, and lists of jobs, beside a large backlog."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from statistics import median, quantiles
from typing import Any, Final

import grpc
from outbox.v1 import email_job_pb2, email_job_service_pb2, stats_service_pb2
from outbox.v1.email_job_service_pb2_grpc import EmailJobServiceStub
from outbox.v1.stats_service_pb2_grpc import StatsServiceStub

from bench.backlog import FEW_SENDERS
from bench.bench import LARGE, Bench, Connection
from bench.filling import USER
from bench.results import OUTBOX, Figures, RatioTarget
from bench.row import BenchRow

_SMALL: Final = 10_000
_PAGE: Final = 50
_PAGES: Final = 1_000
_REPEATS: Final = 15
_SCHEDULED: Final = email_job_pb2.EMAIL_JOB_STATE_SCHEDULED
_FAILED: Final = email_job_pb2.EMAIL_JOB_STATE_FAILED


async def _sender_ids(connection: Connection, count: int) -> list[str]:
    cursor = await connection.execute(
        "SELECT id FROM senders WHERE email LIKE 's%%' ORDER BY id LIMIT %s", [count]
    )
    return [str(row[0]) for row in await cursor.fetchall()]


async def _stats(jobs: int, bench: Bench, number: int) -> Figures:
    del number
    async with (
        bench.waiting(FEW_SENDERS, jobs) as stack,
        bench.connected(stack.database_url) as connection,
    ):
        ids = await _sender_ids(connection, FEW_SENDERS)
        with stack.process("stats"):
            async with grpc.aio.insecure_channel(stack.stats) as channel:
                stub = StatsServiceStub(channel)
                times = []
                for i in range(bench.size.calls):
                    sender = random.choice(ids)  # noqa: S311 - not a secret
                    request = stats_service_pb2.GetSenderStatsRequest(sender_id=sender)
                    began = time.perf_counter()
                    await stub.GetSenderStats(request)
                    # The first calls open the connections.
                    if i >= 20:
                        times.append(1000 * (time.perf_counter() - began))
    return {"p50_ms": median(times), "p99_ms": quantiles(times, n=100)[98]}


Call = Callable[[str], Awaitable[email_job_service_pb2.ListEmailJobsResponse]]


async def _lists(bench: Bench, number: int) -> Figures:
    """Return the median time of each kind of list, its first page and its thousandth."""
    del number
    async with (
        bench.waiting(FEW_SENDERS, bench.size.jobs) as stack,
        bench.connected(stack.database_url) as connection,
    ):
        cursor = await connection.execute(
            "SELECT b.sender_id, b.id FROM batches AS b JOIN senders AS s ON s.id = b.sender_id"
            " WHERE s.email LIKE %s ORDER BY b.id LIMIT 1",
            [f"{LARGE}%"],
        )
        row = await cursor.fetchone()
        sender, batch = map(str, row) if row else ((await _sender_ids(connection, 1))[0], "")
        (other,) = await _sender_ids(connection, 1)
        kinds: dict[str, dict[str, Any]] = {
            "user": {},
            "user_waiting": {"state": _SCHEDULED},
            "user_failed": {"state": _FAILED},
            "sender": {"sender_id": sender},
            "sender_waiting": {"sender_id": sender, "state": _SCHEDULED},
            "sender_failed": {"sender_id": other, "state": _FAILED},
            "batch_waiting": {"batch_id": batch, "state": _SCHEDULED},
            "recipient": {"recipient": "r5-1@example.net"},
        }
        figures: dict[str, float] = {}
        with stack.process("scheduler"):
            async with grpc.aio.insecure_channel(stack.scheduler) as channel:
                for kind, fields in kinds.items():
                    call = partial(_page, channel, fields)
                    figures[f"{kind}_ms"] = await _timed(call, "")
                    # Some lists are shorter: then it is their last page.
                    token = await _last_token(call)
                    figures[f"{kind}_page_1000_ms"] = await _timed(call, token)
    return figures | {"slowest_ms": max(figures.values())}


async def _page(
    channel: grpc.aio.Channel, fields: dict[str, Any], token: str
) -> email_job_service_pb2.ListEmailJobsResponse:
    request = email_job_service_pb2.ListEmailJobsRequest(
        user_id=USER, page_size=_PAGE, page_token=token, **fields
    )
    return await EmailJobServiceStub(channel).ListEmailJobs(request)


async def _timed(call: Call, token: str) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        await call(token)
        times.append(1000 * (time.perf_counter() - began))
        # A slow list is known after a few calls.
        if sum(times) > 3_000:
            break
    return median(times)


async def _last_token(call: Call) -> str:
    token = ""
    began = time.monotonic()
    for _ in range(_PAGES - 1):
        following = (await call(token)).next_page_token
        if not following or time.monotonic() - began > 30:
            break
        token = following
    return token


_MANY_JOBS, _FEW_JOBS = OUTBOX, f"{OUTBOX}, {_SMALL:,} jobs"


async def _stats_of_all(bench: Bench, number: int) -> Figures:
    return await _stats(bench.size.jobs, bench, number)


ROWS: Final = (
    BenchRow(
        "stats",
        "GetSenderStats of senders at random, one call after the other",
        {_MANY_JOBS: _stats_of_all, _FEW_JOBS: partial(_stats, _SMALL)},
        (
            RatioTarget((_MANY_JOBS, "p99_ms"), 5.0, most=1.0),
            RatioTarget((_MANY_JOBS, "p99_ms"), ((_FEW_JOBS, "p99_ms"),), most=1.5),
        ),
        size=lambda size: f"{size.jobs:,} jobs of {FEW_SENDERS:,} senders",
    ),
    BenchRow(
        "lists",
        f"ListEmailJobs with pages of {_PAGE}: median of the first page, and of the thousandth (of "
        "the last one, where there are fewer)",
        {OUTBOX: _lists},
        (RatioTarget((OUTBOX, "slowest_ms"), 20.0, most=1.0),),
        size=lambda size: f"{size.jobs:,} jobs of one user",
    ),
)
