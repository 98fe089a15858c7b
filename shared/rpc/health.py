"""The health service (`grpc.health.v1`) of one server: all its services serve, or none does.

The servicer of grpcio-health-checking is not used. It holds a lock while it writes to a watcher, so
one watcher that does not read would keep the server from reporting that it drains.
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
    """Reports the health of each name in `services` and of "" (the server); first NOT_SERVING."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(("", SERVICE_NAME, *services))
        self._serving = False
        self._changed = asyncio.Event()

    @property
    def serving(self) -> bool:
        """Whether it reports SERVING."""
        return self._serving

    def set(self, *, serving: bool) -> None:
        """Report SERVING or NOT_SERVING from now on, also to every watcher."""
        if serving == self._serving:
            return
        self._serving = serving
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        """Return the current state; NOT_FOUND for a name that this server does not serve."""
        if request.service not in self._services:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"this server has no service {request.service!r}"
            )
        return _Status(status=self._state(request.service))

    async def List(
        self,
        request: health_pb2.HealthListRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> health_pb2.HealthListResponse:
        """Return the state of every name."""
        return health_pb2.HealthListResponse(
            statuses={name: _Status(status=self._state(name)) for name in self._services}
        )

    async def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Return the current state, and each change of it."""
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
    """The part of a server that `follow_dependencies` uses, such as GrpcServer's."""

    def set_serving(self, serving: bool) -> None:
        """Set whether health reports SERVING."""


async def follow_dependencies(
    server: Switch,
    checks: Mapping[str, Callable[[], Awaitable[object]]],
    stop: asyncio.Event,
    *,
    report: Callable[[Mapping[str, bool]], None] | None = None,
    interval: timedelta = timedelta(seconds=1),
    limit: timedelta = timedelta(seconds=2),
) -> None:
    """Let health report SERVING while every dependency answers, until `stop` is set.

    `report` gets the result of each round. Each check asks one dependency (its name is for the log)
    and raises if that cannot be reached. A
    check that takes longer than `limit` counts as failed. It is cancelled, but not awaited: psycopg
    then asks the server to end the statement, which takes 10 s if the server hangs.
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
        if report is not None:
            report({name: name not in gone for name in checks})
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
    """Whether a check succeeded. After any error, the dependency counts as unreachable."""
    return check.done() and not check.cancelled() and check.exception() is None
