"""gRPC with the published service config, as any client uses it, against a misbehaving server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib.resources import files

import grpc
import pytest
import pytest_asyncio
from outbox.v1.batch_pb2 import BatchOptions
from outbox.v1.batch_service_pb2 import ScheduleBatchRequest
from outbox.v1.batch_service_pb2_grpc import BatchServiceStub
from outbox.v1.sender_service_pb2 import CreateSenderRequest, GetSenderRequest
from outbox.v1.sender_service_pb2_grpc import SenderServiceStub

from tests.misbehaving import AWAY, MisbehavingServer, misbehaving_server

CONFIG = files("outbox.v1").joinpath("service_config.json").read_text(encoding="utf-8")


@pytest_asyncio.fixture
async def server() -> AsyncIterator[MisbehavingServer]:
    async with misbehaving_server() as running:
        yield running


async def test_grpc_retries_what_may_be_repeated_and_nothing_else(
    server: MisbehavingServer,
) -> None:
    options = [("grpc.service_config", CONFIG)]
    async with grpc.aio.insecure_channel(server.address, options=options) as channel:
        senders = SenderServiceStub(channel)
        server.faults = [AWAY, AWAY]
        found = await senders.GetSender(GetSenderRequest(sender_id="7"))
        assert (found.sender_id, len(server.requests)) == ("7", 3)

        server.requests, server.faults = [], [AWAY]
        request = ScheduleBatchRequest(options=BatchOptions(request_id="once"), csv=b"email\n")
        await BatchServiceStub(channel).ScheduleBatch(request)
        assert [each.options.request_id for each in server.requests] == ["once", "once"]

        server.requests, server.faults = [], [AWAY]
        with pytest.raises(grpc.RpcError) as caught:
            await senders.CreateSender(CreateSenderRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert len(server.requests) == 1
