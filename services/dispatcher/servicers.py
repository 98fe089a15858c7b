"""DispatcherService: proto to domain and back."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import dispatcher_pb2, dispatcher_service_pb2, dispatcher_service_pb2_grpc

from services.dispatcher.dispatcher import Dispatcher
from services.dispatcher.progress import Progress
from services.dispatcher.smtp import EndpointState, SmtpPool


class DispatcherServicer(dispatcher_service_pb2_grpc.DispatcherServiceServicer):
    """Shows and drains this process; for operators alone, as `shared.auth` has it."""

    def __init__(
        self,
        *,
        dispatcher_id: str,
        concurrency: int,
        dispatcher: Dispatcher,
        pool: SmtpPool,
        progress: Progress,
        on_drain: Callable[[], None],
    ) -> None:
        self._id = dispatcher_id
        self._concurrency = concurrency
        self._dispatcher = dispatcher
        self._pool = pool
        self._progress = progress
        self._on_drain = on_drain

    async def GetDispatcherStatus(  # noqa: N802 - the proto's name
        self,
        request: dispatcher_service_pb2.GetDispatcherStatusRequest,  # noqa: ARG002
        context: grpc.aio.ServicerContext[object, object],  # noqa: ARG002
    ) -> dispatcher_pb2.DispatcherStatus:
        """Return what the dispatcher does now."""
        return self._status()

    async def Drain(  # noqa: N802 - the proto's name
        self,
        request: dispatcher_service_pb2.DrainRequest,  # noqa: ARG002
        context: grpc.aio.ServicerContext[object, object],  # noqa: ARG002
    ) -> dispatcher_service_pb2.DrainResponse:
        """Take no more jobs; answer when nothing is in flight."""
        self._on_drain()
        given_back = await self._dispatcher.drain()
        return dispatcher_service_pb2.DrainResponse(
            status=self._status(), given_back_count=given_back
        )

    def _status(self) -> dispatcher_pb2.DispatcherStatus:
        attempts, sent = self._progress.rates()
        uptime = Duration()
        uptime.FromTimedelta(timedelta(seconds=self._progress.uptime))
        return dispatcher_pb2.DispatcherStatus(
            dispatcher_id=self._id,
            state=(
                dispatcher_pb2.DISPATCHER_STATE_DRAINING
                if self._dispatcher.draining
                else dispatcher_pb2.DISPATCHER_STATE_SERVING
            ),
            in_flight_count=self._dispatcher.in_flight,
            concurrency=self._concurrency,
            rates=dispatcher_pb2.DispatcherRates(
                sent_per_second=sent,
                attempts_per_second=attempts,
                sent_count=self._progress.sent_count,
                attempt_count=self._progress.attempt_count,
            ),
            endpoints=[_endpoint(state) for state in self._pool.states()],
            uptime=uptime,
        )


def _endpoint(state: EndpointState) -> dispatcher_pb2.EndpointStatus:
    last_error_time = None
    if state.last_error_at is not None:
        last_error_time = Timestamp()
        last_error_time.FromDatetime(datetime.fromtimestamp(state.last_error_at, UTC))
    return dispatcher_pb2.EndpointStatus(
        host=state.host,
        port=state.port,
        connection_count=state.connection_count,
        last_error=state.last_error,
        last_error_time=last_error_time,
    )
