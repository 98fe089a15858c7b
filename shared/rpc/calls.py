"""The interceptor of all calls: authentication, deadline, limits, error mapping and the call log.

It is one interceptor, because each layer around a handler costs time for every streamed message.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import grpc
import structlog
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from outbox_server.shared.callers import (
    Authenticator,
    Caller,
    CallerKind,
    check_may_call,
    keep_place,
    leave_turn,
    set_current_caller,
)
from outbox_server.shared.errors import InvalidInput, NotFound, ResourceExhausted, Unavailable
from outbox_server.shared.fair_shares import FairShares
from outbox_server.shared.metrics.calls import UNKNOWN_METHOD, CallMetrics, MethodMetrics
from outbox_server.shared.quotas.in_flight import CallGroup, CallsInFlight
from outbox_server.shared.rpc.call_log import CallLog, bind_ids
from outbox_server.shared.rpc.common_fields import raise_completed
from outbox_server.shared.rpc.decoding import Decoder
from outbox_server.shared.rpc.errors import build_status, status_of
from outbox_server.shared.rpc.field_limits import check_fields
from outbox_server.shared.rpc.peers import PeerPlaces, peer_of_call
from outbox_server.shared.rpc.reads import check_may_change
from outbox_server.shared.rpc.refusals import RefusalRate
from outbox_server.shared.rpc.request_rates import RequestRates
from outbox_server.shared.rpc.streams import (
    Decode,
    checked_stream,
    complete_stream,
    read_the_rest,
    uninterrupted,
)
from outbox_server.shared.turns import Turns

if TYPE_CHECKING:
    from outbox_server.shared.traces.tracer import Tracer

# The deadline of a unary call whose caller set none, in seconds.
DEFAULT_DEADLINE: Final = 30.0
# The deadline of an upload, in seconds. A large upload takes long, but a caller that sends very
# slowly must not hold a place for ever.
UPLOAD_DEADLINE: Final = 3600.0
# The maximum number of calls at once, of methods without places of their own. More calls would only
# wait for a database connection, each with a request of up to 5 MiB. Waiting calls have no request
# in memory.
_CALLS: Final = 64
_CALLS_WAITING: Final = 1_000
# The maximum number of server streams at once. Each costs a task and a message, and lasts long.
_STREAMS: Final = 1_000
# How long a stream lasts that begins while the server stops, in seconds.
_LATE_STREAM_S: Final = 1.0

# Services that need no API key: kubelets and proxies have none, and the API that reflection shows
# is published. Their calls are answered during a drain as well, do not delay it, and are logged at
# level debug.
_TOOLING: Final = ("/grpc.health.", "/grpc.reflection.")
# How many of these calls may run at once, of one peer and of all peers. A health watch has no end.
# Calls that end by themselves have as many places of their own. A gateway is one peer together with
# its clients, so their watches must not take the places of its own health checks.
_TOOLING_PER_PEER: Final = 100
_TOOLING_CALLS: Final = 1_000
_ANONYMOUS: Final = Caller(user_id=None, kind=CallerKind.LOCAL)

# grpcio's classes are generic in their stubs only.
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]"


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of a server; must be its only interceptor.

    Server streams must be async generators, other methods coroutines.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        *,
        default_deadline: float = DEFAULT_DEADLINE,
        shares: Mapping[str, FairShares] | None = None,
        metrics: CallMetrics,
        tracer: Tracer | None = None,
    ) -> None:
        """`shares` has the methods with places of their own, such as `/outbox.v1.A/Method`."""
        self._authenticator = authenticator
        self._shares = dict(shares or {})
        self._calls = FairShares("calls", _CALLS, waiting=_CALLS_WAITING)
        self._watches = FairShares("watches", _STREAMS)
        self._by_user = CallsInFlight()
        self._turns = Turns()
        self._rates = RequestRates()
        self._refusals = RefusalRate()
        self._checks, self._tooling_streams = (
            PeerPlaces(what, per_peer=_TOOLING_PER_PEER, total=_TOOLING_CALLS)
            for what in ("health checks", "health watches and reflection calls")
        )
        self._default_deadline = default_deadline
        self._log = structlog.get_logger("outbox.calls")
        self._metrics = metrics
        self._tracer = tracer
        self._decoder = Decoder()
        self._unknown = metrics.of(UNKNOWN_METHOD)
        # The handlers by method, so that each method is wrapped once.
        self._handlers: dict[str, _Handler] = {}
        self._streams: set[asyncio.Timeout] = set()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ending_streams = False

    async def wait_until_idle(self) -> None:
        """Return when no call is in progress, except health checks and reflection."""
        await self._idle.wait()

    def end_streams(self) -> None:
        """End every server stream with UNAVAILABLE (SHUTTING_DOWN).

        A watch never ends by itself. Streams that begin later end within a second, after their
        first message.
        """
        self._ending_streams = True
        now = asyncio.get_running_loop().time()
        for limit in self._streams:
            if not limit.expired():
                limit.reschedule(now)

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> _Handler:
        """Return the method's handler, wrapped."""
        method = handler_call_details.method
        known = self._handlers.get(method)
        if known is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None:
            return _refuse_unknown_method(method, self._unknown)
        return self._handlers.setdefault(method, self._wrap(method, handler))

    def _wrap(self, method: str, handler: _Handler) -> _Handler:
        if handler.response_streaming:
            return self._wrap_stream(method, handler)
        metrics = self._metrics.of(method)
        behaviour: Any = handler.stream_unary if handler.request_streaming else handler.unary_unary
        decode = self._decode_of(handler)
        encode: Any = handler.response_serializer
        streaming = handler.request_streaming

        async def answer_stream(request: Any, context: _Context) -> Any:
            request = self._rates.limited(request)
            try:
                messages = complete_stream(request, context, decode)
                found = encode(await behaviour(messages, context))
            except grpc.aio.BaseError:  # the call has ended
                raise
            except Exception:
                await read_the_rest(request)
                raise
            await read_the_rest(request)
            return found

        async def answer(request: Any, context: _Context) -> Any:
            async def work() -> Any:
                # Decode and encode here: grpc.aio would send the text of an error to the caller.
                if streaming:
                    return await answer_stream(request, context)
                message = await decode(await self._rates.single_message(request, context))
                check_fields(message)
                bind_ids(message)
                try:
                    return encode(await behaviour(message, context))
                except (InvalidInput, NotFound) as error:
                    raise_completed(error, message)

            limit = UPLOAD_DEADLINE if streaming else self._default_deadline
            group = CallGroup.UPLOADS if streaming else CallGroup.CALLS
            return await self._run(method, context, work, limit, metrics=metrics, group=group)

        # A unary request is read as a stream, too (on the wire it is one). Otherwise grpc.aio would
        # read up to 5 MiB of it before the caller is authenticated and has a place.
        return grpc.stream_unary_rpc_method_handler(answer, None, None)

    def _wrap_stream(self, method: str, handler: _Handler) -> _Handler:
        metrics = self._metrics.of(method)
        behaviour: Any = (
            handler.stream_stream if handler.request_streaming else handler.unary_stream
        )
        decode = self._decode_of(handler)
        encode: Any = handler.response_serializer
        streaming = handler.request_streaming

        async def stream(request: Any, context: _Context) -> None:
            messages = behaviour(request, context)
            # Close the generator when the caller leaves, not at a later garbage collection.
            async with aclosing(messages):
                async for message in messages:
                    # A stream may outlive its key: after a revocation it gets no more messages.
                    await self._authenticate(method, context)
                    await uninterrupted(context.write(message))
                    # It mostly waits from now on.
                    leave_turn()

        async def answer(request: Any, context: _Context) -> None:
            async def work() -> None:
                if streaming:
                    messages = self._rates.limited(request)
                    return await stream(checked_stream(messages, decode), context)
                message = await decode(await self._rates.single_message(request, context))
                check_fields(message)
                try:
                    return await stream(message, context)
                except (InvalidInput, NotFound) as error:
                    raise_completed(error, message)

            await self._run(method, context, work, None, metrics=metrics, group=CallGroup.WATCHES)

        return grpc.stream_stream_rpc_method_handler(answer, None, encode)

    def _decode_of(self, handler: _Handler) -> Decode:
        kind: Any = handler.request_deserializer
        # The generated code has the method `FromString` of the message's class.
        return partial(self._decoder.decode, kind.__self__)

    async def _run(
        self,
        method: str,
        context: _Context,
        work: Callable[[], Awaitable[Any]],
        default_limit: float | None,
        *,
        metrics: MethodMetrics,
        group: CallGroup,
    ) -> Any:
        started = time.perf_counter()
        tooling = method.startswith(_TOOLING)
        call = CallLog(self._log, method, context, quiet=tooling)
        span = None
        if not tooling:
            self._begin()
            if self._tracer is not None:
                span = self._tracer.begin_call(method, context.invocation_metadata() or ())
        try:
            return await self._limited(method, context, work, default_limit, call, group=group)
        except grpc.aio.AbortError:  # the handler has sent a status itself
            call.code = context.code().name
            raise
        except (asyncio.CancelledError, grpc.aio.BaseError):  # the caller left, or the server stops
            call.code = grpc.StatusCode.CANCELLED.name
            raise
        except Exception as error:  # noqa: BLE001 - the text of no other error may reach a caller
            status = _status_of_call(error, method, context)
            call.failed(status, error)
            _forget_frames(error)
            await context.abort_with_status(rpc_status.to_status(status))
        finally:
            if not tooling:
                self._end()
            seconds = time.perf_counter() - started
            metrics.ended(call.code, seconds)
            if span is not None:
                span.end(call.code)
            call.write(seconds)

    async def _limited(
        self,
        method: str,
        context: _Context,
        work: Callable[[], Awaitable[Any]],
        default_limit: float | None,
        log: CallLog,
        *,
        group: CallGroup,
    ) -> Any:
        left = context.time_remaining()
        stream = group is CallGroup.WATCHES
        limit = asyncio.timeout(default_limit if left is None else left)
        try:
            async with limit:
                if stream:
                    self._streams.add(limit)
                    if self._ending_streams:
                        limit.reschedule(asyncio.get_running_loop().time() + _LATE_STREAM_S)
                caller = await self._authenticate(method, context, log)
                set_current_caller(caller)
                if method.startswith(_TOOLING):
                    places = self._tooling_streams if stream else self._checks
                    with places.place_of(peer_of_call(context.peer())):
                        return await work()
                self._turns.note_arrival(caller.claimant)
                shares = self._shares_of(method, stream=stream)
                admitted = False
                try:
                    with self._by_user.counted(caller.user_id, caller.quotas, group):
                        async with (
                            shares.entered(caller.claimant) as place,
                            self._turns.entered(caller.claimant) as turn,
                        ):
                            admitted = True
                            keep_place(place, turn)
                            return await work()
                except ResourceExhausted:
                    if not admitted:
                        await self._refusals.wait(caller.claimant)
                    raise
        except TimeoutError as error:
            if not limit.expired():
                raise
            if stream and self._ending_streams:
                raise Unavailable(
                    "the server is shutting down; call again", reason="SHUTTING_DOWN"
                ) from error
            raise _DeadlineExceededError from error
        finally:
            self._streams.discard(limit)

    async def _authenticate(
        self, method: str, context: _Context, log: CallLog | None = None
    ) -> Caller:
        if method.startswith(_TOOLING):
            return _ANONYMOUS
        caller = await self._authenticator.authenticate(context.invocation_metadata() or ())
        if log is not None:
            log.caller = caller
        check_may_call(caller, method)
        check_may_change(caller, method)
        return caller

    def _shares_of(self, method: str, *, stream: bool) -> FairShares:
        return self._shares.get(method) or (self._watches if stream else self._calls)

    def _begin(self) -> None:
        self._in_flight += 1
        self._idle.clear()

    def _end(self) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()


class _DeadlineExceededError(Exception):
    """The deadline of the call has passed."""


def _status_of_call(error: Exception, method: str, context: _Context) -> Status:
    if isinstance(error, _DeadlineExceededError):
        return build_status(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "the call took longer than its deadline",
            "DEADLINE_EXCEEDED",
            metadata={"method": method},
        )
    # The generated base class does this for a method that a servicer does not implement.
    if isinstance(error, NotImplementedError) and context.code() == grpc.StatusCode.UNIMPLEMENTED:
        return _not_implemented(f"{method} is not served yet", "NOT_IMPLEMENTED", method)
    return status_of(error)


def _not_implemented(message: str, reason: str, method: str) -> Status:
    return build_status(grpc.StatusCode.UNIMPLEMENTED, message, reason, metadata={"method": method})


def _forget_frames(error: BaseException) -> None:
    """Free the variables of the functions that an error passed through, such as the call's message.

    grpc.aio keeps the error of an aborted call in a reference cycle, which only a full collection
    frees. Until then, each refused request of 5 MiB would take up to 70 MB.
    """
    rest: list[BaseException | None] = [error]
    forgotten: set[int] = set()
    while rest:
        found = rest.pop()
        if found is not None and id(found) not in forgotten:
            forgotten.add(id(found))
            found.__traceback__ = None
            rest += [found.__cause__, found.__context__]


def _refuse_unknown_method(method: str, metrics: MethodMetrics) -> _Handler:
    """Return a handler that refuses calls. It is stream to stream, so it takes any call."""

    async def refuse(_: Any, context: _Context) -> None:
        metrics.ended(grpc.StatusCode.UNIMPLEMENTED.name, 0)
        status = _not_implemented(f"this server has no method {method}", "METHOD_NOT_FOUND", method)
        await context.abort_with_status(rpc_status.to_status(status))

    return grpc.stream_stream_rpc_method_handler(refuse)
