"""What the tests of pods and of a host with systemd ask of the services."""

from __future__ import annotations

import collections
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from outbox.v1.batch_pb2 import BatchOptions
from outbox.v1.sender_pb2 import Sender
from outbox.v1.sender_service_pb2 import CreateSenderRequest, UpdateSenderRequest
from outbox.v1.stats_service_pb2 import GetSenderStatsRequest
from outbox_client import AsyncClient

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.passwords import OWNER
from tests.conftest import Stores
from tests.eventually import eventually


def database_url(stores: Stores, database: str) -> str:
    """Return the URL of a database with the password in it, for those who cannot read its file."""
    postgres = stores.postgres
    login = f"{OWNER}:{postgres.passwords.password_of(OWNER)}"
    return f"postgresql://{login}@127.0.0.1:{postgres.port}/{database}"


async def serving(port: int, probe: str) -> bool:
    """Whether a probe (`liveness`, `readiness`) passes at a health port of this machine."""
    request = health_pb2.HealthCheckRequest(service=probe)
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def arrivals(inbox: Inbox, sender: str) -> collections.Counter[str]:
    """How many mails of a sender each address has got."""
    mails = [mail for mail in inbox.mails if mail.mail_from == sender]
    return collections.Counter(address for mail in mails for address in mail.rcpt_tos)


@asynccontextmanager
async def waiting_mails(
    new_client: Callable[[], AsyncClient],
    inbox: Inbox,
    until_ready: Callable[[], Awaitable[None]],
    email: str,
) -> AsyncIterator[None]:
    """Schedule mails, and yield while most of them wait; then check that each arrives once."""
    count = 40
    # The gaps last longer than a busy machine takes to stop and start all services.
    sender = Sender(email=email, min_gap=Duration(seconds=60))
    addresses = {f"{number}.{email}" for number in range(count)}
    async with new_client() as client:
        made = await client.senders.CreateSender(CreateSenderRequest(user_id="shop", sender=sender))
        options = BatchOptions(
            user_id="shop", sender_id=made.sender_id, subject="Hello", body="Good day"
        )
        answer = await client.upload([{"email": address} for address in sorted(addresses)], options)
        assert not answer.rejections
        await eventually(lambda: arrivals(inbox, email))
    yield
    assert 1 <= arrivals(inbox, email).total() < count
    await until_ready()
    async with new_client() as client:
        faster = Sender(sender_id=made.sender_id, min_gap=Duration(nanos=50_000_000))
        await client.senders.UpdateSender(UpdateSenderRequest(sender=faster))
        done = await client.wait_for_batch(answer.batch.batch_id, "shop")
        assert done.counts.sent_count == count
        assert arrivals(inbox, email) == dict.fromkeys(addresses, 1)
        stats = await client.stats.GetSenderStats(
            GetSenderStatsRequest(user_id="shop", sender_id=made.sender_id)
        )
        assert stats.counts.sent_count == count
