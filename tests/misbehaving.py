"""A gRPC server that misbehaves as a test requires, and both clients to call it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
from grpc_status import rpc_status
from outbox.v1 import (
    batch_pb2,
    batch_service_pb2,
    batch_service_pb2_grpc,
    sender_pb2,
    sender_service_pb2,
    sender_service_pb2_grpc,
)
from outbox_client import AsyncClient, Client

from outbox_server.shared.errors import FieldViolation
from outbox_server.shared.rpc.errors import build_status
from tests.eventually import PATIENCE


@dataclass(frozen=True)
class FailedCall:
    """The end of one call."""

    code: grpc.StatusCode
    message: str = "no"
    # If empty, the error has no details, like an error of a proxy.
    reason: str = ""
    retry_after: timedelta | None = None
    violations: tuple[FieldViolation, ...] = ()

    async def end(self, context: Any) -> None:
        if not self.reason:
            await context.abort(self.code, self.message)
        status = build_status(
            self.code,
            self.message,
            self.reason,
            metadata={"limit": "3"},
            violations=self.violations,
            retry_after=self.retry_after,
        )
        await context.abort_with_status(rpc_status.to_status(status))


AWAY = FailedCall(grpc.StatusCode.UNAVAILABLE)


@dataclass
class MisbehavingServer:
    """The faults of the next calls, and the calls received."""

    address: str = ""
    # One per call, in order. After the last fault, all calls succeed.
    faults: list[FailedCall] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    # All bytes of each upload that ended.
    uploads: list[bytes] = field(default_factory=list)
    cancelled: int = 0
    # The messages that each WatchBatch streams before it ends.
    streams: list[list[batch_service_pb2.WatchBatchResponse]] = field(default_factory=list)
    # The answers of GetBatch.
    batches: list[batch_pb2.Batch] = field(default_factory=list)
    silent: bool = False

    async def take(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.times.append(asyncio.get_running_loop().time())
        self.metadata.append(dict(context.invocation_metadata()))
        if self.silent:
            await asyncio.Event().wait()
        if self.faults:
            await self.faults.pop(0).end(context)


class _Senders(sender_service_pb2_grpc.SenderServiceServicer):
    def __init__(self, state: MisbehavingServer) -> None:
        self._state = state

    async def GetSender(self, request: Any, context: Any) -> sender_pb2.Sender:
        await self._state.take(request, context)
        return sender_pb2.Sender(sender_id=request.sender_id)

    async def CreateSender(self, request: Any, context: Any) -> sender_pb2.Sender:
        await self._state.take(request, context)
        return sender_pb2.Sender(sender_id="1")

    async def ListSenders(
        self, request: Any, context: Any
    ) -> sender_service_pb2.ListSendersResponse:
        await self._state.take(request, context)
        page = int(request.page_token or 0)
        return sender_service_pb2.ListSendersResponse(
            senders=[sender_pb2.Sender(sender_id=f"{page}{n}") for n in range(2)],
            next_page_token=str(page + 1) if page < 2 else "",
        )


class _Batches(batch_service_pb2_grpc.BatchServiceServicer):
    def __init__(self, state: MisbehavingServer) -> None:
        self._state = state

    async def ScheduleBatch(
        self, request: Any, context: Any
    ) -> batch_service_pb2.ScheduleBatchResponse:
        await self._state.take(request, context)
        return batch_service_pb2.ScheduleBatchResponse(batch=batch_pb2.Batch(batch_id="1"))

    async def UploadBatch(
        self, request_iterator: Any, context: Any
    ) -> batch_service_pb2.ScheduleBatchResponse:
        received = bytearray()
        try:
            async for message in request_iterator:
                if message.HasField("options"):
                    await self._state.take(message, context)
                received += message.chunk
            # Like Outbox's servers, it fails on a cancelled call, which ends like any other.
            await context.send_initial_metadata(())
        except (asyncio.CancelledError, grpc.aio.InternalError):
            self._state.cancelled += 1
            raise
        self._state.uploads.append(bytes(received))
        return batch_service_pb2.ScheduleBatchResponse(batch=batch_pb2.Batch(batch_id="1"))

    async def GetBatch(self, request: Any, context: Any) -> batch_pb2.Batch:
        await self._state.take(request, context)
        return self._state.batches.pop(0)

    async def WatchBatch(
        self, request: Any, context: Any
    ) -> AsyncIterator[batch_service_pb2.WatchBatchResponse]:
        await self._state.take(request, context)
        for message in self._state.streams.pop(0):
            yield message


@asynccontextmanager
async def misbehaving_server(
    credentials: grpc.ServerCredentials | None = None,
) -> AsyncIterator[MisbehavingServer]:
    """Run the server on a free port."""
    state = MisbehavingServer()
    server = grpc.aio.server()
    # The stubs make the methods abstract. Here a missing method must answer UNIMPLEMENTED.
    kinds: tuple[Any, Any] = (_Senders, _Batches)
    for kind in kinds:
        kind.__abstractmethods__ = frozenset()
    senders, batches = (kind(state) for kind in kinds)
    sender_service_pb2_grpc.add_SenderServiceServicer_to_server(senders, server)
    batch_service_pb2_grpc.add_BatchServiceServicer_to_server(batches, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    state.address = f"127.0.0.1:{port}"
    await server.start()
    try:
        yield state
    finally:
        await server.stop(0)


class EitherClient:
    """One of the two clients behind an async interface, so that each test covers both."""

    def __init__(self, kind: str) -> None:
        self._kind: Any = {"asyncio": AsyncClient, "threads": Client}[kind]
        self.blocking = kind == "threads"

    async def do(self, address: str, use: Callable[[Any], Any], **settings: Any) -> Any:
        """Call `use` with a client of `address`; return its result, and an iterator as a list."""
        async with asyncio.timeout(PATIENCE):
            if self.blocking:
                return await asyncio.to_thread(self._do, address, use, settings)
            async with self._kind(address, **settings) as client:
                result = use(client)
                if inspect.isawaitable(result):
                    return await result
                return [item async for item in result]

    def _do(self, address: str, use: Callable[[Any], Any], settings: dict[str, Any]) -> Any:
        with self._kind(address, **settings) as client:
            result = use(client)
            return list(result) if isinstance(result, Iterator) else result
