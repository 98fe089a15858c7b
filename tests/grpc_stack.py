"""A server with two services whose answers a test sets, and its clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from outbox.v1 import (
    batch_pb2,
    batch_service_pb2,
    batch_service_pb2_grpc,
    stats_pb2,
    stats_service_pb2,
    stats_service_pb2_grpc,
)

from outbox_server.shared.fair_shares import FairShares
from outbox_server.shared.rpc.server import GrpcServer, ServiceBinding
from outbox_server.shared.settings import Settings
from tests.eventually import PATIENCE

STATS = "outbox.v1.StatsService"
BATCHES = "outbox.v1.BatchService"
GRACE = timedelta(seconds=5)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

Detail = TypeVar("Detail", bound=Message)


class Stats(stats_service_pb2_grpc.StatsServiceServicer):
    """Runs the handlers of a test; all other methods are the generated ones."""

    def __init__(self) -> None:
        self.behaviour: Callable[[], Awaitable[None]] = self.nothing
        self.answer: Any = None
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.ended: asyncio.Future[type[BaseException] | None] = asyncio.Future()

    async def GetSenderStats(
        self, request: stats_service_pb2.GetSenderStatsRequest, context: Any
    ) -> stats_pb2.SenderStats:
        del context
        await self.observed()
        return self.answer or stats_pb2.SenderStats(sender_id=request.sender_id)

    async def WatchSenderStats(
        self, request: stats_service_pb2.WatchSenderStatsRequest, context: Any
    ) -> AsyncIterator[stats_service_pb2.WatchSenderStatsResponse]:
        del request, context
        yield stats_service_pb2.WatchSenderStatsResponse()
        await self.observed()

    async def observed(self) -> None:
        self.entered.set()
        try:
            await self.behaviour()
        except BaseException as error:
            self._end(type(error))
            raise
        self._end(None)

    def _end(self, how: type[BaseException] | None) -> None:
        if not self.ended.done():  # of the first call
            self.ended.set_result(how)

    async def nothing(self) -> None:
        """Return at once."""

    async def wait(self) -> None:
        await self.release.wait()


class Batches(batch_service_pb2_grpc.BatchServiceServicer):
    """Records whether an upload looked complete."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.ended: asyncio.Future[str] = asyncio.Future()

    async def UploadBatch(
        self, request_iterator: AsyncIterator[batch_service_pb2.UploadBatchRequest], context: Any
    ) -> batch_service_pb2.ScheduleBatchResponse:
        del context
        try:
            async for _ in request_iterator:
                self.begun.set()
        except BaseException as error:
            self.ended.set_result(type(error).__name__)
            raise
        self.ended.set_result("whole")
        return batch_service_pb2.ScheduleBatchResponse(batch=batch_pb2.Batch(batch_id="1"))


class Stack:
    """A server, its servicers and a channel to it."""

    def __init__(self, settings: Settings) -> None:
        # The stubs make the methods abstract. Here a missing method must answer UNIMPLEMENTED.
        self.stats = Stats()  # type: ignore[abstract]
        self.batches = Batches()  # type: ignore[abstract]
        self.server = GrpcServer(
            settings,
            "127.0.0.1:0",
            [
                ServiceBinding(
                    STATS,
                    lambda server: stats_service_pb2_grpc.add_StatsServiceServicer_to_server(
                        self.stats, server
                    ),
                    {
                        "WatchSenderStats": FairShares("watches", 1),
                        "GetSenderStats": FairShares("calls", 2, waiting=1),
                    },
                ),
                ServiceBinding(
                    BATCHES,
                    lambda server: batch_service_pb2_grpc.add_BatchServiceServicer_to_server(
                        self.batches, server
                    ),
                ),
            ],
        )

    def connect(self, channel: grpc.aio.Channel) -> None:
        self.channel: Any = channel  # for calls that the stubs do not have
        self.stub = stats_service_pb2_grpc.StatsServiceStub(channel)
        self.upload: Any = channel.stream_unary(f"/{BATCHES}/UploadBatch")
        self.health = health_pb2_grpc.HealthStub(channel)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    async def call(self, timeout: float | None = PATIENCE) -> stats_pb2.SenderStats:  # noqa: ASYNC109
        request = stats_service_pb2.GetSenderStatsRequest(sender_id="7")
        return await self.stub.GetSenderStats(request, timeout=timeout)

    async def state(self, service: str = "") -> int:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await self.health.Check(request, timeout=PATIENCE)
        state: int = answer.status
        return state

    async def refused(self, call: Awaitable[Any]) -> Status:
        """Return the status and details with which `call` ends."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(PATIENCE):
                await call
        status = rpc_status.from_call(caught.value)
        assert isinstance(status, Status), f"no details: {caught.value}"
        return status


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Stack]:
    stack = Stack(settings)
    await stack.server.start()
    async with grpc.aio.insecure_channel(stack.address) as channel:
        stack.connect(channel)
        yield stack
        stack.stats.release.set()
    await stack.server.drain_and_stop(GRACE)


def detail(status: Status, kind: type[Detail]) -> Detail:
    message = kind()
    assert any(packed.Unpack(message) for packed in status.details), status
    return message


def reason(status: Status) -> tuple[str, str]:
    info = detail(status, error_details_pb2.ErrorInfo)
    assert info.domain == "outbox"
    code = next(code.name for code in grpc.StatusCode if code.value[0] == status.code)
    return code, info.reason
