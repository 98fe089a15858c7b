"""`grpc.health.v1` of one server, and what decides it: all its services serve, or none does.

Not grpcio-health-checking's servicer: that one holds a lock while it writes to a watcher, so one
watcher that does not read would keep the server from ever telling that it drains.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, Protocol

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from outbox_server.shared.loops import Loop

SERVICE_NAME = "grpc.health.v1.Health"

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """Answers for each name of `services`, and for "" (the server). Starts NOT_SERVING."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(("", SERVICE_NAME, *services))
        self._serving = False
        self._changed = asyncio.Event()

    @property
    def serving(self) -> bool:
        """Whether the answer is SERVING."""
        return self._serving

    def set(self, *, serving: bool) -> None:
        """Answer SERVING or NOT_SERVING from now on, and tell every watcher."""
        if serving == self._serving:
            return
        self._serving = serving
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        """Answer the state now; NOT_FOUND for a name that this server does not serve."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return _Status(status=self._state(request.service))

    async def List(
        self,
        request: health_pb2.HealthListRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> health_pb2.HealthListResponse:
        """Answer the state of every name."""
        return health_pb2.HealthListResponse(
            statuses={name: _Status(status=self._state(name)) for name in self._services}
        )

    async def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Answer the state now, and again whenever it changes."""
        last = None
        while True:
            changed = self._changed
            state = self._state(request.service)
            if state != last:
                last = state
                yield _Status(status=state)
            await changed.wait()

    def _state(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in self._services:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if self._serving else _Status.NOT_SERVING


class Switch(Protocol):
    """What `follow_dependencies` sets; GrpcServer has it."""

    def set_serving(self, serving: bool) -> None:
        """Say by health whether calls can succeed."""


async def follow_dependencies(
    server: Switch,
    checks: Mapping[str, Callable[[], Awaitable[object]]],
    stop: asyncio.Event,
    *,
    interval: timedelta = timedelta(seconds=1),
    limit: timedelta = timedelta(seconds=2),
) -> None:
    """Let health say SERVING while every dependency answers, until `stop` is set.

    Each check asks one dependency (by name, for the log) and raises if it is gone; one that takes
    longer than `limit` counts as gone. It is cancelled then, but not waited for: psycopg asks a
    server to end the statement, and one that is frozen takes 10 s not to answer that.
    """
    log = structlog.get_logger("outbox.health")
    gone_before: set[str] | None = None
    asking: dict[str, asyncio.Task[None]] = {}

    async def check_all() -> timedelta:
        nonlocal gone_before, asking
        begun = {name: asyncio.create_task(_run(checks[name])) for name in checks.keys() - asking}
        asking |= begun
        if begun:
            _, late = await asyncio.wait(begun.values(), timeout=limit.total_seconds())
            for check in late:
                check.cancel()
        gone = {name for name, check in asking.items() if not _answered(check)}
        asking = {name: check for name, check in asking.items() if not check.done()}
        if gone != gone_before:
            gone_before = gone
            (log.warning if gone else log.info)("dependencies", gone=sorted(gone))
        server.set_serving(not gone)
        return interval

    try:
        await Loop("health", check_all).run(stop)
    finally:
        for check in asking.values():
            check.cancel()
        await asyncio.gather(*asking.values(), return_exceptions=True)


async def _run(check: Callable[[], Awaitable[object]]) -> None:
    await check()


def _answered(check: asyncio.Task[None]) -> bool:
    """Whether it ended well; whatever a driver raises, the dependency did not answer."""
    return check.done() and not check.cancelled() and check.exception() is None
