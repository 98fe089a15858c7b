"""What one user may do to slow down another, for `bench.neighbours`."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import (
    batch_pb2,
    batch_service_pb2,
    batch_service_pb2_grpc,
    email_job_service_pb2,
    email_job_service_pb2_grpc,
    sender_pb2,
    sender_service_pb2,
    sender_service_pb2_grpc,
    stats_service_pb2,
    stats_service_pb2_grpc,
    suppression_service_pb2,
    suppression_service_pb2_grpc,
    webhook_pb2,
    webhook_service_pb2,
    webhook_service_pb2_grpc,
)

from outbox_server.shared.auth.keys import make_key

_WAITING_JOBS: Final = 100_000
_LIMIT_S: Final = 60.0
# Where the connections of floods come from: not the address of the other user.
_SOURCE: Final = "127.0.0.2"

Call = Callable[[], Awaitable[Any]]


class Client:
    """The calls of one user, over connections of its own."""

    def __init__(self, scheduler: str, stats: str, key: str, certificate: bytes) -> None:
        trusted = grpc.ssl_channel_credentials(certificate)
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1))
        self.scheduler = grpc.aio.secure_channel(scheduler, trusted, options)
        self.stats = grpc.aio.secure_channel(stats, trusted, options)
        self.key = (("authorization", f"Bearer {key}"),)
        self.senders = sender_service_pb2_grpc.SenderServiceStub(self.scheduler)
        self.batches = batch_service_pb2_grpc.BatchServiceStub(self.scheduler)
        self.jobs = email_job_service_pb2_grpc.EmailJobServiceStub(self.scheduler)
        self.suppressions = suppression_service_pb2_grpc.SuppressionServiceStub(self.scheduler)
        self.webhooks = webhook_service_pb2_grpc.WebhookServiceStub(self.scheduler)
        self.counts = stats_service_pb2_grpc.StatsServiceStub(self.stats)
        self.sender = ""

    async def open(self) -> None:
        """Wait for the servers, and create a sender."""
        async with asyncio.timeout(_LIMIT_S):
            await self.scheduler.channel_ready()
            await self.stats.channel_ready()
        sender = sender_pb2.Sender(email="news@example.com", hourly_limit=1_000_000)
        request = sender_service_pb2.CreateSenderRequest(sender=sender)
        found = await self.senders.CreateSender(request, metadata=self.key, wait_for_ready=True)
        self.sender = found.sender_id

    async def get(self) -> None:
        """Read a sender."""
        request = sender_service_pb2.GetSenderRequest(sender_id=self.sender)
        await self.senders.GetSender(request, metadata=self.key)

    async def schedule(
        self, csv: bytes = b"email\na@example.net\n", *, validate_only: bool = False, **options: Any
    ) -> str:
        """Accept a batch. Return its id."""
        request = batch_service_pb2.ScheduleBatchRequest(
            options=self.options(**options), csv=csv, validate_only=validate_only
        )
        answer = await self.batches.ScheduleBatch(request, metadata=self.key)
        return str(answer.batch.batch_id)

    async def count(self) -> None:
        """Read the counts of a sender."""
        request = stats_service_pb2.GetSenderStatsRequest(sender_id=self.sender)
        await self.counts.GetSenderStats(request, metadata=self.key)

    def options(self, **options: Any) -> batch_pb2.BatchOptions:
        """Return the options of a new batch."""
        found = {"subject": "Hello", "body": "Hello", **options}
        return batch_pb2.BatchOptions(request_id=str(uuid.uuid4()), sender_id=self.sender, **found)


class Eve(Client):
    """The calls that may slow down those of others."""

    async def attack(self, kind: str, address: str) -> None:
        """Make the calls of one kind, without end."""
        at_once, prepare = KINDS[kind]
        call = await prepare(self, address)

        async def repeat() -> None:
            while True:
                try:
                    await call()
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                        await asyncio.sleep(0.05)
                except (OSError, ssl.SSLError):
                    await asyncio.sleep(0.05)

        await asyncio.gather(*(repeat() for _ in range(at_once)))

    async def waiting_batch(self) -> str:
        """Accept a batch whose jobs wait until tomorrow. Return its id."""
        rows = "".join(f"r{n}@example.net\n" for n in range(_WAITING_JOBS))
        return await self.schedule(f"email\n{rows}".encode(), schedule_time=_tomorrow())


def _tomorrow() -> Timestamp:
    return Timestamp(seconds=int(time.time()) + 86_400)


async def _get(eve: Eve, _: str) -> Call:
    return eve.get


async def _strangers(eve: Eve, _: str) -> Call:
    request = sender_service_pb2.GetSenderRequest(sender_id=eve.sender)

    async def call() -> None:
        key = (("authorization", f"Bearer {make_key().text}"),)
        await eve.senders.GetSender(request, metadata=key)

    return call


async def _schedule(eve: Eve, _: str) -> Call:
    return eve.schedule


async def _entries(eve: Eve, _: str) -> Call:
    request = sender_service_pb2.UpdateSenderRequest()
    request.update_mask.paths.extend([""] * 2_400_000)
    wire = request.SerializeToString()
    update: Any = eve.scheduler.unary_unary("/outbox.v1.SenderService/UpdateSender")
    return lambda: update(wire, metadata=eve.key)


def _file() -> bytes:
    rows = "".join(f"r{n}@example.net,{'x' * 60}\n" for n in range(50_000))
    return f"email,name\n{rows}".encode()[:4_100_000].rpartition(b"\n")[0]


async def _csv(eve: Eve, _: str) -> Call:
    csv = _file()
    return lambda: eve.schedule(csv)


async def _validations(eve: Eve, _: str) -> Call:
    csv = _file()
    return lambda: eve.schedule(csv, validate_only=True)


async def _imports(eve: Eve, _: str) -> Call:
    csv = _file()

    async def messages() -> AsyncIterator[suppression_service_pb2.ImportSuppressionsRequest]:
        for _ in range(4):
            yield suppression_service_pb2.ImportSuppressionsRequest(chunk=csv)

    return lambda: eve.suppressions.ImportSuppressions(messages(), metadata=eve.key)


async def _webhooks(eve: Eve, _: str) -> Call:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(reply, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    for _number in range(10):
        request = webhook_service_pb2.CreateWebhookRequest(webhook=webhook_pb2.Webhook(url=url))
        await eve.webhooks.CreateWebhook(request, metadata=eve.key)
    csv = b"email\n" + b"".join(b"r%d@example.net\n" % n for n in range(1_000))

    async def cancel() -> None:
        # Each job has two events for each webhook.
        batch = await eve.schedule(csv, schedule_time=_tomorrow())
        cancelling = batch_service_pb2.CancelBatchRequest(batch_id=batch)
        await eve.batches.CancelBatch(cancelling, metadata=eve.key)

    # The server lasts as long as the call that is returned.
    cancel.server = server  # type: ignore[attr-defined]
    return cancel


async def _uploads(eve: Eve, _: str) -> Call:
    chunk = "".join(f"r{n}@example.net,{'x' * 60}\n" for n in range(10_000)).encode()

    async def messages() -> Any:
        yield batch_service_pb2.UploadBatchRequest(options=eve.options())
        yield batch_service_pb2.UploadBatchRequest(chunk=b"email,name\n")
        for _ in range(100):
            yield batch_service_pb2.UploadBatchRequest(chunk=chunk)

    return lambda: eve.batches.UploadBatch(messages(), metadata=eve.key)


async def _exports(eve: Eve, _: str) -> Call:
    batch = await eve.waiting_batch()

    async def export() -> None:
        request = email_job_service_pb2.ExportEmailJobsRequest(batch_id=batch)
        async for _ in eve.jobs.ExportEmailJobs(request, metadata=eve.key):
            pass

    return export


async def _lists(eve: Eve, _: str) -> Call:
    batch = await eve.waiting_batch()
    request = email_job_service_pb2.ListEmailJobsRequest(
        batch_id=batch, filter="row_number > 99000", page_size=1_000
    )
    return lambda: eve.jobs.ListEmailJobs(request, metadata=eve.key)


async def _watches(eve: Eve, _: str) -> Call:
    request = batch_service_pb2.WatchBatchRequest(batch_id=await eve.waiting_batch())

    async def watch() -> None:
        call = eve.batches.WatchBatch(request, metadata=eve.key)
        await call.read()
        call.cancel()

    return watch


async def _previews(eve: Eve, _: str) -> Call:
    rows = "".join(f"r{n}@example.net\n" for n in range(100_000))
    options, csv = eve.options(), f"email\n{rows}".encode()
    request = batch_service_pb2.PreviewBatchRequest(options=options, csv=csv, row_numbers=[99_999])
    return lambda: eve.batches.PreviewBatch(request, metadata=eve.key)


async def _templates(eve: Eve, _: str) -> Call:
    sorting = (
        '{% assign l = name | split: "," %}{% for i in (1..1000) %}'
        "{% assign m = l | sort | reverse | uniq %}{% endfor %}x"
    )
    cell = ",".join(f"item{n}" for n in range(900))
    csv = f'email,name\na@example.net,"{cell}"\n'.encode()
    return lambda: eve.schedule(csv, body=sorting)


async def _forecasts(eve: Eve, _: str) -> Call:
    options = batch_pb2.BatchOptions(sender_id=eve.sender)
    planned = stats_service_pb2.PlannedBatch(options=options, recipient_count=10_000_000)
    request = stats_service_pb2.ForecastBatchRequest(planned_batch=planned)
    return lambda: eve.counts.ForecastBatch(request, metadata=eve.key)


async def _handshakes(_eve: Eve, address: str) -> Call:
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])

    async def connect() -> None:
        _, writer = await asyncio.open_connection(
            host, int(port), ssl=context, local_addr=(_SOURCE, 0)
        )
        writer.close()
        with suppress(OSError, ssl.SSLError):
            await writer.wait_closed()

    return connect


async def _processor(_eve: Eve, _: str) -> Call:
    block = bytes(100_000_000)
    # Without the interpreter's lock, so two of them use two cores.
    return lambda: asyncio.to_thread(hashlib.sha256, block)


# Does not call, but uses two cores: what the machine itself does to Ann's calls.
CONTROL: Final = "processor"
# How many calls Eve makes at once, and what prepares them.
KINDS: Final[dict[str, tuple[int, Callable[[Eve, str], Awaitable[Call]]]]] = {
    "get": (100, _get),
    "crowd": (1_500, _get),
    "strangers": (100, _strangers),
    "schedule": (100, _schedule),
    "entries": (10, _entries),
    "csv": (8, _csv),
    "validations": (8, _validations),
    "imports": (8, _imports),
    "uploads": (8, _uploads),
    "exports": (20, _exports),
    "lists": (30, _lists),
    "watches": (100, _watches),
    "previews": (8, _previews),
    "webhooks": (4, _webhooks),
    "templates": (20, _templates),
    "forecasts": (50, _forecasts),
    "handshakes": (40, _handshakes),
    CONTROL: (2, _processor),
}
