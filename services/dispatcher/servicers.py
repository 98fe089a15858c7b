"""Implements DispatcherService: converts protos to the domain and back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final, TypeVar

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1 import dispatcher_pb2, dispatcher_service_pb2, dispatcher_service_pb2_grpc
from outbox.v1.dispatcher_service_pb2 import DrainDispatcherResponse
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.dispatcher.dispatcher import Dispatcher
from outbox_server.services.dispatcher.progress import Progress
from outbox_server.services.dispatcher.smtp import EndpointState, SmtpPool
from outbox_server.services.dispatcher.storage.reports import LiveDispatcher, live_dispatchers
from outbox_server.shared.database.audit_events import RecordedChange, record_change
from outbox_server.shared.database.change_requests import (
    RequestKey,
    begin_request,
    store_first_answer,
)
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.database.ownership import bind_call
from outbox_server.shared.errors import Violations
from outbox_server.shared.filters.fields import Value
from outbox_server.shared.filters.matching import selected
from outbox_server.shared.filters.resources import (
    DISPATCHER_FIELDS,
    DISPATCHER_ORDERS,
    checked_list,
)
from outbox_server.shared.queue.circuit_keys import RELAY
from outbox_server.shared.queue.circuits import Circuit
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.rpc.proto_mapping import to_timestamp
from outbox_server.shared.rpc.requested_changes import request_digest, requested_change, reused

T = TypeVar("T")

_log = structlog.get_logger(__name__)

# How long a transaction about a drain may take, in seconds: sends in flight may end before.
_RECORD_S: Final = 5.0
_STATES: Final = {
    False: dispatcher_pb2.DISPATCHER_STATE_SERVING,
    True: dispatcher_pb2.DISPATCHER_STATE_DRAINING,
}
# The values that a filter of ListDispatchers compares.
_VALUES: Final[Mapping[str, Callable[[LiveDispatcher], Value]]] = {
    "dispatcher_id": lambda one: one.report.dispatcher_id,
    "state": lambda one: _STATES[one.report.draining],
    "in_flight_count": lambda one: one.report.in_flight,
    "concurrency": lambda one: one.report.concurrency,
    "oldest_lease_time": lambda one: one.oldest_lease_at,
    "start_time": lambda one: one.started_at,
    "report_time": lambda one: one.seen_at,
}


class DispatcherServicer(dispatcher_service_pb2_grpc.DispatcherServiceServicer):
    """Shows and drains this process. `shared.callers` allows it only to operators."""

    def __init__(
        self,
        *,
        engine: AsyncEngine,
        dispatcher_id: str,
        concurrency: int,
        dispatcher: Dispatcher,
        pool: SmtpPool,
        progress: Progress,
        queues: Sequence[Queue],
        on_drain: Callable[[], None],
        held_since: Callable[[], datetime | None],
    ) -> None:
        """`held_since` returns since when the installation is held; None if it is not."""
        self._engine = engine
        self._id = dispatcher_id
        self._concurrency = concurrency
        self._dispatcher = dispatcher
        self._pool = pool
        self._progress = progress
        self._queues = queues
        self._on_drain = on_drain
        self._held_since = held_since
        self._recording: asyncio.Task[None] | None = None

    async def GetDispatcherStatus(
        self,
        request: dispatcher_service_pb2.GetDispatcherStatusRequest,
        context: grpc.aio.ServicerContext[object, object],
    ) -> dispatcher_pb2.DispatcherStatus:
        """Return the current state of the dispatcher."""
        return await self._status()

    async def ListDispatchers(
        self,
        request: dispatcher_service_pb2.ListDispatchersRequest,
        context: grpc.aio.ServicerContext[object, object],
    ) -> dispatcher_service_pb2.ListDispatchersResponse:
        """Return the dispatchers that run."""
        wrong = Violations()
        tree, descending = checked_list(request, DISPATCHER_FIELDS, DISPATCHER_ORDERS, wrong)
        wrong.raise_any()
        bind_call(None)
        async with self._engine.connect() as connection:
            found = selected(await live_dispatchers(connection), tree, _VALUES)
        return dispatcher_service_pb2.ListDispatchersResponse(
            dispatchers=map(_to_dispatcher, reversed(found) if descending else found)
        )

    async def DrainDispatcher(
        self,
        request: dispatcher_service_pb2.DrainDispatcherRequest,
        context: grpc.aio.ServicerContext[object, object],
    ) -> DrainDispatcherResponse:
        """Take no more jobs, and return when no job is in flight."""
        change = requested_change(request)
        key = RequestKey(None, request.request_id)
        if key.request_id:
            digest = request_digest(request, b"", self._id)
            begin = partial(begin_request, key=key, digest=digest)
            # Limited by the deadline of the call, and by the limits of each statement.
            earlier = await self._in_transaction(begin, limit=None)
            if earlier is not None and earlier.digest != digest:
                raise reused(key.request_id)
            if earlier is not None and earlier.answer is not None:
                return DrainDispatcherResponse.FromString(earlier.answer)
        begins = not self._dispatcher.draining
        self._on_drain()
        if begins:
            # It goes on if the caller leaves.
            self._recording = asyncio.create_task(self._record(change))
        given_back = await self._dispatcher.drain()
        if self._recording is not None:
            await asyncio.shield(self._recording)
        answer = DrainDispatcherResponse(status=await self._status(), given_back_count=given_back)
        return await self._first_answer(key, answer) if key.request_id else answer

    async def _first_answer(
        self, key: RequestKey, answer: DrainDispatcherResponse
    ) -> DrainDispatcherResponse:
        """Store the answer, unless a call with the same id was faster. Return the stored one."""
        store = partial(store_first_answer, key=key, answer=answer.SerializeToString())
        try:
            return DrainDispatcherResponse.FromString(await self._in_transaction(store))
        except DATABASE_ERRORS as error:
            # The dispatcher is drained. A repeated call will drain it again, which changes nothing.
            _log.warning("drain_answer_not_stored", error=type(error).__name__)
            return answer

    async def _in_transaction(
        self, work: Callable[[AsyncConnection], Awaitable[T]], limit: float | None = _RECORD_S
    ) -> T:
        bind_call(None)
        async with asyncio.timeout(limit), self._engine.begin() as connection:
            return await work(connection)

    async def _record(self, change: RecordedChange) -> None:
        """Write the event of a drain to the audit log, unless PostgreSQL cannot be reached."""
        event = replace(
            change,
            target=f"dispatchers/{self._id}",
            before={"state": "SERVING"},
            after={"state": "DRAINING"},
        )
        try:
            await self._in_transaction(partial(record_change, change=event))
        except DATABASE_ERRORS as error:
            _log.warning(
                "drain_not_recorded",
                actor=event.actor,
                identity=event.identity,
                reason=event.reason,
                error=type(error).__name__,
            )

    async def _status(self) -> dispatcher_pb2.DispatcherStatus:
        states = self._pool.states()
        circuits = await self._circuits_of(states)
        of_users = [circuits[key] for key in self._dispatcher.relay_keys() if key in circuits]
        attempts, sent = self._progress.rates()
        held = self._held_since()
        uptime = Duration()
        uptime.FromTimedelta(timedelta(seconds=self._progress.uptime))
        return dispatcher_pb2.DispatcherStatus(
            dispatcher_id=self._id,
            state=_STATES[self._dispatcher.draining],
            in_flight_count=self._dispatcher.in_flight,
            concurrency=self._concurrency,
            rates=dispatcher_pb2.DispatcherRates(
                sent_per_second=sent,
                attempts_per_second=attempts,
                sent_count=self._progress.sent_count,
                attempt_count=self._progress.attempt_count,
            ),
            endpoints=[
                _endpoint(
                    state,
                    circuits.get(state.circuit),
                    of_users if state.circuit == RELAY else (),
                )
                for state in states
            ],
            uptime=uptime,
            hold_start_time=_timestamp(None if held is None else held.timestamp()),
        )

    async def open_circuits(self) -> dict[str, Circuit]:
        """Return the open circuits of the endpoints that this dispatcher knows, by endpoint."""
        return await self._circuits_of(self._pool.states())

    async def _circuits_of(self, states: Collection[EndpointState]) -> dict[str, Circuit]:
        """Return the open circuits by endpoint; if several shards have one, the oldest of them."""
        endpoints = {state.circuit for state in states}
        endpoints.update(self._dispatcher.relay_keys())
        found: dict[str, Circuit] = {}
        if not endpoints:
            return found
        for queue in self._queues:
            # If a shard does not answer, the rest of the status is still valid.
            with suppress(*QUEUE_ERRORS):
                for endpoint, circuit in (
                    await queue.circuits_of_endpoints(sorted(endpoints))
                ).items():
                    first = found.setdefault(endpoint, circuit)
                    if circuit.open_since_ms < first.open_since_ms:
                        found[endpoint] = circuit
        return found


def _to_dispatcher(found: LiveDispatcher) -> dispatcher_pb2.Dispatcher:
    report = found.report
    oldest = found.oldest_lease_at
    return dispatcher_pb2.Dispatcher(
        dispatcher_id=report.dispatcher_id,
        state=_STATES[report.draining],
        in_flight_count=report.in_flight,
        concurrency=report.concurrency,
        sent_per_second=report.sent_per_second,
        attempts_per_second=report.attempts_per_second,
        oldest_lease_time=None if oldest is None else to_timestamp(oldest),
        start_time=to_timestamp(found.started_at),
        report_time=to_timestamp(found.seen_at),
    )


def _endpoint(
    state: EndpointState, circuit: Circuit | None, of_users: Sequence[Circuit]
) -> dispatcher_pb2.EndpointStatus:
    """Return the status of an endpoint. `of_users` are circuits of single users at the relay."""
    stopped = len(of_users) if circuit is None else 0
    circuit = circuit or min(of_users, key=lambda each: each.open_since_ms, default=None)
    return dispatcher_pb2.EndpointStatus(
        host=state.host,
        port=state.port,
        connection_count=state.connection_count,
        last_error=state.last_error,
        last_error_time=_timestamp(state.last_error_at),
        circuit_open_time=_timestamp(circuit.open_since_ms / 1000 if circuit else None),
        next_probe_time=_timestamp(circuit.next_probe_ms / 1000 if circuit else None),
        stopped_user_count=stopped,
    )


def _timestamp(seconds: float | None) -> Timestamp | None:
    if seconds is None:
        return None
    found = Timestamp()
    found.FromDatetime(datetime.fromtimestamp(seconds, UTC))
    return found
