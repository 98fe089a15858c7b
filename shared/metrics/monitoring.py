"""The metrics of a process, and the endpoint that serves them to an operator."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Self

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
)

from outbox_server.shared.metrics.calls import CallMetrics
from outbox_server.shared.metrics.endpoint import MetricsEndpoint
from outbox_server.shared.metrics.stalls import StallWatch


class Monitoring:
    """The metrics of one service process, served while the context is open.

    Metrics are always counted, which costs microseconds. They are served only with `listen`
    (OUTBOX_METRICS_LISTEN). Everything is registered in `registry`, never in prometheus_client's
    global one, so that several services can run in one process.
    """

    def __init__(self, service: str, listen: str = "") -> None:
        """Register what all services have. `service` is a label: scheduler, dispatcher or stats.

        Raises:
            ConfigurationError: OUTBOX_METRICS_LISTEN is not `host:port`.
        """
        # They would be a second sample of each counter, with its start time, which nothing here
        # uses.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.calls = CallMetrics(self.registry)
        self._serving = Gauge(
            "outbox_serving",
            "1 while health reports SERVING, else 0.",
            ["service"],
            registry=self.registry,
        ).labels(service)
        self._dependencies = Gauge(
            "outbox_dependency_up",
            "1 while a store that the service needs answers, else 0.",
            ["dependency"],
            registry=self.registry,
        )
        self._stalls = StallWatch(self.registry)
        self._endpoint = MetricsEndpoint(listen, self.registry) if listen else None
        self._refresh: list[Callable[[], Awaitable[None]]] = []
        self._watching: asyncio.Task[None] | None = None

    def show_serving(self, serving: Callable[[], bool]) -> None:
        """Show the health of the server."""
        self._serving.set_function(serving)

    def show_dependencies(self, up: Mapping[str, bool]) -> None:
        """Show which stores answered the last check."""
        for name, answers in up.items():
            self._dependencies.labels(name).set(answers)

    def before_scrape(self, refresh: Callable[[], Awaitable[None]]) -> None:
        """Await `refresh` before each answer to a scrape, within a time limit."""
        self._refresh.append(refresh)

    async def __aenter__(self) -> Self:
        """Serve the metrics.

        Raises:
            ConfigurationError: OUTBOX_METRICS_LISTEN cannot be bound.
        """
        if self._endpoint is not None:
            self._endpoint.refresh = self._refresh
            await self._endpoint.start()
            self._watching = asyncio.create_task(self._stalls.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop serving them."""
        if self._endpoint is not None:
            await self._endpoint.close()
        if self._watching is not None:
            self._watching.cancel()
