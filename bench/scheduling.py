"""Calls of the scheduler: senders, batches and uploads, as a caller makes them."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import batch_pb2, batch_service_pb2, sender_pb2, sender_service_pb2
from outbox.v1.batch_service_pb2_grpc import BatchServiceStub
from outbox.v1.sender_service_pb2_grpc import SenderServiceStub

from bench.filling import BODY, HTML, SUBJECT, USER

_CHUNK: Final = 64 * 1024


def csv_of(rows: int, prefix: str) -> bytes:
    """Return a CSV with five columns."""
    lines = ["email,name,order,city,points"]
    lines += [
        f"{prefix}{i}@example.net,Ann Example {i},{i:08},Springfield,{i % 200}" for i in range(rows)
    ]
    return ("\r\n".join(lines) + "\r\n").encode()


async def create_senders(channel: grpc.aio.Channel, count: int) -> list[str]:
    """Create senders; return their ids."""
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


def options_of(
    sender_id: str, start: datetime, spacing: timedelta = timedelta(0)
) -> batch_pb2.BatchOptions:
    """Return the options of a new batch."""
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


async def upload(
    channel: grpc.aio.Channel, options: batch_pb2.BatchOptions, csv: bytes
) -> batch_service_pb2.ScheduleBatchResponse:
    """Upload a CSV in parts."""

    async def parts() -> AsyncIterator[batch_service_pb2.UploadBatchRequest]:
        yield batch_service_pb2.UploadBatchRequest(options=options)
        for start in range(0, len(csv), _CHUNK):
            yield batch_service_pb2.UploadBatchRequest(chunk=csv[start : start + _CHUNK])

    return await BatchServiceStub(channel).UploadBatch(parts())


def a_month_later() -> datetime:
    """Return a time at which mail waits for the whole run."""
    return datetime.now(UTC) + timedelta(days=30)
