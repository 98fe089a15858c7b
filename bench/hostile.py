"""Measures what costly templates of one user do to event loops and to mail of another user."""

from __future__ import annotations

import asyncio
import math
import urllib.request
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Final

import grpc
import psycopg
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import batch_pb2, batch_service_pb2, sender_pb2, sender_service_pb2
from outbox.v1.batch_service_pb2_grpc import BatchServiceStub
from outbox.v1.sender_service_pb2_grpc import SenderServiceStub
from prometheus_client.parser import text_string_to_metric_families

from bench.world import BenchStack
from outbox_server.deploy.ports import free_port

# The longest stall of an event loop that Outbox promises, in milliseconds.
PROMISED_STALL_MS: Final = 50
# Ann's mails with each body.
_COUNT, _SPACING = 200, timedelta(milliseconds=100)
_LIMIT_S: Final = 120
_STALLS: Final = "outbox_event_loop_stall_seconds"
# Ann's mails: half of them only insert columns.
_BODIES: Final = ("Dear {{ name }}", "{% if name %}Dear {{ name | capitalize }}{% endif %}")
_SORTING: Final = (
    '{% assign l = name | split: "," %}{% for i in (1..1000) %}'
    "{% assign m = l | sort | reverse | uniq %}{% endfor %}x"
)
_LONG: Final = "{% for i in (1..300) %}{{ name }}{% endfor %}"
_GROWING: Final = "{% for i in (1..1000) %}{{ name }}{% endfor %}"
_LIST: Final = ",".join(f"item{n}" for n in range(900))
# Eve's batches: a body, a cell, and the number of mails.
_BATCHES: Final = (
    (_SORTING, f'"{_LIST}"', 6),
    # Mails of 9 MB.
    (_LONG, "x" * 29_000, 4),
    (_GROWING, "\u00fc" * 30_000, 6),
    ("{{ name }}" * 900, "y" * 60, 50),
    ("{{ name }}" + "\u00fc" * 100_000, "y" * 4_000, 50),
    ("{{ name | date: '%s' }}" * 5_000, "1 January 2026 12:00", 6),
)
# Templates that are refused.
_REFUSED: Final = ("{{" + " " * 12_000, "{{" * 4_000, "{% raw %}" * 8_000, "{{name}}" * 30_000)


async def hostile(stack: BenchStack) -> dict[str, float]:
    """Send Ann's mail, first alone and then beside Eve's: stalls and lateness in ms."""
    alone, quiet = await _run(stack, evil=False)
    beside, stall = await _run(stack.with_new_ports(), evil=True)
    return {
        "quiet_lateness_ms_p99": alone,
        "hostile_lateness_ms_p99": beside,
        "quiet_longest_stall_ms": quiet,
        "hostile_longest_stall_ms": stall,
    }


async def _run(stack: BenchStack, *, evil: bool) -> tuple[float, float]:
    """Return the lateness of Ann's mail, and the longest stall of scheduler and dispatcher, in ms.

    The stall is the upper bound of its bucket in the histogram.
    """
    metrics = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    with ExitStack() as processes:
        for service, listen in zip(("scheduler", "dispatcher"), metrics, strict=True):
            processes.enter_context(
                stack.process(service, metrics_listen=listen, dispatcher_concurrency="20")
            )
        async with grpc.aio.insecure_channel(stack.scheduler) as channel:
            # So that the workers and the connections exist before anything is measured.
            await _send_some(stack, channel, 1, timedelta(0))
            before = [await asyncio.to_thread(_stalls, each) for each in metrics]
            eve = asyncio.create_task(_attack(channel)) if evil else None
            late = await _send_some(stack, channel, _COUNT, _SPACING)
            if eve is not None:
                await eve
            after = [await asyncio.to_thread(_stalls, each) for each in metrics]
            return late, 1000 * max(map(_longest, before, after))


async def _attack(channel: grpc.aio.Channel) -> None:
    stub, at_once = BatchServiceStub(channel), asyncio.Semaphore(2)

    # Without authentication, calls have no shares.
    async def schedule(request: batch_service_pb2.ScheduleBatchRequest) -> None:
        async with at_once:
            await stub.ScheduleBatch(request)

    for _ in range(2):
        calls = []
        for body, cell, count in _BATCHES:
            sender = await _sender(channel, "eve")
            options = _options("eve", sender, body, datetime.now(UTC), timedelta(0))
            calls.append(schedule(_request(options, cell, count)))
        for body in _REFUSED:
            options = _options("eve", sender, body, datetime.now(UTC), timedelta(0))
            calls.append(schedule(_request(options, "x", 1)))
        for ended in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(ended, BaseException) and not isinstance(ended, grpc.aio.AioRpcError):
                raise ended


async def _send_some(
    stack: BenchStack, channel: grpc.aio.Channel, count: int, spacing: timedelta
) -> float:
    """Send Ann's mails with each body. Return the 99th percentile of their lateness in ms."""
    begin = datetime.now(UTC) + timedelta(seconds=1)
    batches = []
    for body in _BODIES:
        options = _options("ann", await _sender(channel, "ann"), body, begin, spacing)
        answer = await BatchServiceStub(channel).ScheduleBatch(_request(options, "Ann", count))
        batches.append(int(answer.batch.batch_id))
    query = """
        SELECT count(*), percentile_cont(0.99) WITHIN GROUP (ORDER BY late_ms)
        FROM attempts AS a JOIN email_jobs AS j ON j.id = a.email_job_id
        WHERE j.batch_id = ANY(%s) AND a.outcome = 1
    """
    async with await psycopg.AsyncConnection.connect(
        stack.database_url, autocommit=True
    ) as connection:
        for _ in range(_LIMIT_S * 4):
            row = await (await connection.execute(query, [batches])).fetchone()
            if row is not None and row[0] == count * len(batches):
                return float(row[1])
            await asyncio.sleep(0.25)
    raise SystemExit(f"not all of {count * len(batches)} mails were sent in two minutes")


async def _sender(channel: grpc.aio.Channel, user: str) -> str:
    sender = await SenderServiceStub(channel).CreateSender(
        sender_service_pb2.CreateSenderRequest(
            user_id=user,
            sender=sender_pb2.Sender(email=f"{user}@example.com", hourly_limit=1_000_000),
        )
    )
    return str(sender.sender_id)


def _options(
    user: str, sender: str, body: str, begin: datetime, spacing: timedelta
) -> batch_pb2.BatchOptions:
    schedule_time, between = Timestamp(), Duration()
    schedule_time.FromDatetime(begin)
    between.FromTimedelta(spacing)
    return batch_pb2.BatchOptions(
        request_id=str(uuid.uuid4()),
        user_id=user,
        sender_id=sender,
        subject="Hello",
        body=body,
        schedule_time=schedule_time,
        spacing=between,
    )


def _request(
    options: batch_pb2.BatchOptions, cell: str, count: int
) -> batch_service_pb2.ScheduleBatchRequest:
    rows = "".join(f"r{n}@example.net,{cell}\n" for n in range(count))
    return batch_service_pb2.ScheduleBatchRequest(
        options=options, csv=f"email,name\n{rows}".encode()
    )


def _stalls(address: str) -> dict[float, float]:
    """Return how many stalls were at most this many seconds long."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    for family in text_string_to_metric_families(text):
        if family.name == _STALLS:
            return {
                float(sample.labels["le"]): float(sample.value)
                for sample in family.samples
                if sample.name == f"{_STALLS}_bucket"
            }
    raise RuntimeError(f"{address} has no {_STALLS}")


def _longest(before: Mapping[float, float], after: Mapping[float, float]) -> float:
    total = after[math.inf] - before[math.inf]
    return min(bound for bound in after if after[bound] - before[bound] == total)
