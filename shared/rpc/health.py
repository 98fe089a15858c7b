"""The health service (`grpc.health.v1`) of one server: all its services serve, or none does.

The servicer of grpcio-health-checking is not used. It holds a lock while it writes to a watcher, so
one watcher that does not read would keep the server from reporting that it drains.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Protocol

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from outbox_server.shared.loops import Loop, as_coroutine
from outbox_server.shared.store_trouble import StoreTrouble, trouble_of

SERVICE_NAME = "grpc.health.v1.Health"
NOT_CHECKED: Final = "its stores are not checked yet"
# The pause before a lasting trouble is logged again. It doubles from the first value to the last.
_FIRST_REMINDER_S: Final = 2.0
_LAST_REMINDER_S: Final = 300.0
# In how many parts the time limit of a check is waited for. Each part lasts for at least one turn
# of the event loop. A check of PostgreSQL takes about 40 turns, and 80 with a new connection.
_PARTS: Final = 100

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """Reports the health of each name in `services` and of "" (the server); first NOT_SERVING."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(("", SERVICE_NAME, *services))
        self._serving = False
        # Why it does not serve, in words that may be shown to anybody.
        self.reason = NOT_CHECKED
        self._changed = asyncio.Event()

    @property
    def serving(self) -> bool:
        """Whether it reports SERVING."""
        return self._serving

    def set(self, *, serving: bool, reason: str = "") -> None:
        """Report SERVING or NOT_SERVING from now on, also to every watcher."""
        self.reason = "" if serving else reason
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

    def set_serving(self, serving: bool, reason: str = "") -> None:
        """Set whether health reports SERVING, and otherwise why not, in words for anybody."""


@dataclass(slots=True)
class _Outage:
    """The present trouble of one store, and when it is logged again."""

    trouble: StoreTrouble
    since: float
    pause: float = _FIRST_REMINDER_S
    next_log: float = field(default=0.0)


class _StoreLog:
    """Logs when a store begins to fail, at growing intervals while it does, and its return."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._log = structlog.get_logger("outbox.health")
        self._places = places
        self._outages: dict[str, _Outage] = {}
        self._served: set[str] = set()

    def serves(self, store: str) -> None:
        """Log that a store serves, unless it served before."""
        outage = self._outages.pop(store, None)
        if outage is not None or store not in self._served:
            self._served.add(store)
            seconds = 0 if outage is None else round(time.monotonic() - outage.since)
            self._log.info("store_serves", store=store, after_s=seconds)

    def fails(self, store: str, trouble: StoreTrouble) -> None:
        """Log a trouble, unless it is the same as before and was logged a short time ago."""
        now = time.monotonic()
        outage = self._outages.get(store)
        if outage is None:
            outage = self._outages[store] = _Outage(trouble, now)
        elif outage.trouble.kind != trouble.kind:
            outage.next_log = now
        outage.trouble = trouble
        if now < outage.next_log:
            return
        outage.next_log = now + outage.pause
        outage.pause = min(outage.pause * 2, _LAST_REMINDER_S)
        self._log.warning(
            "store_fails",
            store=store,
            place=self._places.get(store, ""),
            trouble=trouble.kind,
            error=trouble.text,
            for_s=round(now - outage.since),
        )


async def follow_dependencies(
    server: Switch,
    checks: Mapping[str, Callable[[], Awaitable[object]]],
    stop: asyncio.Event,
    *,
    optional: Collection[str] = (),
    places: Mapping[str, str] | None = None,
    report: Callable[[Mapping[str, bool]], None] | None = None,
    interval: timedelta = timedelta(seconds=1),
    limit: timedelta = timedelta(seconds=2),
) -> None:
    """Let health report SERVING while every dependency serves, until `stop` is set.

    Each check does one cheap operation of the kind that the service needs, and raises if that
    fails. Those in `optional` are checked, logged and reported, and health does not depend on them.
    `places` has the host and port of dependencies, for the log. `report` gets the result of each
    round. A check that takes longer than `limit` counts as failed; the time in which this process
    itself was busy does not count. It is cancelled, but not awaited: psycopg then asks the server
    to end the statement, which takes 10 s if it hangs.
    """
    log = _StoreLog(places or {})
    late_text = f"no answer within {limit.total_seconds():g} s"
    asking: dict[str, asyncio.Task[None]] = {}

    async def check_all() -> timedelta:
        nonlocal asking
        begun = {
            name: asyncio.create_task(as_coroutine(checks[name])) for name in checks.keys() - asking
        }
        asking |= begun
        if begun:
            for check in await _late(begun.values(), limit):
                check.cancel()
        gone: dict[str, StoreTrouble] = {}
        for name, check in asking.items():
            trouble = _trouble(check, late_text)
            if trouble is None:
                log.serves(name)
            else:
                gone[name] = trouble
                log.fails(name, trouble)
        asking = {name: check for name, check in asking.items() if not check.done()}
        if report is not None:
            report({name: name not in gone for name in checks})
        needed = sorted(gone.keys() - {*optional})
        reason = "; ".join(f"{name}: {gone[name].kind}" for name in needed)
        server.set_serving(not needed, reason)
        return interval

    try:
        await Loop("health", check_all).run(stop)
    finally:
        for check in asking.values():
            check.cancel()
        await asyncio.gather(*asking.values(), return_exceptions=True)


async def _late(
    checks: Iterable[asyncio.Task[None]], limit: timedelta
) -> Collection[asyncio.Task[None]]:
    """Wait until the checks have ended. Return those that have not after `limit`.

    A busy event loop runs the steps of a check late, although the store has answered. So the limit
    is waited for in parts. Each of them counts as it was planned, however late the loop ends it.
    """
    late = {*checks}
    for _ in range(_PARTS):
        if not late:
            break
        _, late = await asyncio.wait(late, timeout=limit.total_seconds() / _PARTS)
    return late


def _trouble(check: asyncio.Task[None], late: str) -> StoreTrouble | None:
    """Return why a check failed; None if it succeeded. After any error the store does not serve."""
    if not check.done() or check.cancelled():
        return StoreTrouble(late, late)
    error = check.exception()
    return None if error is None else trouble_of(error)
