"""What the processes of all services have in common: metrics, traces, health, and their server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.agreed.run import AgreedRun, Work
from outbox_server.shared.database.schema import SchemaGuard
from outbox_server.shared.metrics.monitoring import Monitoring
from outbox_server.shared.process import serve_until_stopped
from outbox_server.shared.rpc.health import follow_dependencies
from outbox_server.shared.rpc.probes import Probes
from outbox_server.shared.rpc.server import GrpcServer, ServiceBinding
from outbox_server.shared.rpc.server_info import server_service
from outbox_server.shared.store_urls import place_of
from outbox_server.shared.traces.endpoint import open_tracer

if TYPE_CHECKING:
    from outbox_server.shared.traces.tracer import Tracer


@dataclass(eq=False, slots=True)
class ServiceProcess:
    """The process of a service: its metrics and traces and, while it serves, its gRPC server.

    `name` is scheduler, dispatcher or stats. `tracer` is None if traces are off.
    """

    run: AgreedRun
    name: str
    probes: Probes
    monitoring: Monitoring
    tracer: Tracer | None
    _server: GrpcServer | None = None

    def begin_drain(self) -> None:
        """Let health report NOT_SERVING from now on. Calls are still accepted."""
        if self._server is not None:
            self._server.begin_drain()

    async def serve(
        self,
        services: Sequence[ServiceBinding],
        engine: AsyncEngine,
        *,
        statements: AsyncEngine | None = None,
        loops: Sequence[Work],
        always: Sequence[Work] = (),
        check_redis: Callable[[], Awaitable[None]] | None = None,
        needs_redis: bool = True,
    ) -> None:
        """Serve calls of `services` until `run.stop` is set; then drain, and return.

        Health reports SERVING while PostgreSQL and Redis serve. PostgreSQL is checked by
        `statements` or, without it, by `engine`, which also reads the API keys. Without
        `check_redis`, the service does not use Redis. Without `needs_redis`, it also serves while
        Redis does not.
        The `loops` begin when the schema and the stored settings are known, those in `always` at
        once. All of them must end by themselves once `run.stop` is set.

        Raises:
            ConfigurationError: a setting of the server is wrong, or its address is in use.
            ExceptionGroup: a loop failed, or the schema is too new for this release.
        """
        run, settings, stop = self.run, self.run.settings, self.run.stop
        checked = engine if statements is None else statements
        schema = SchemaGuard(checked)
        server = self._server = GrpcServer(
            settings,
            getattr(settings, f"{self.name}_listen"),
            [*services, server_service(self.name, schema)],
            engine=engine,
            probes=self.probes,
            monitoring=self.monitoring,
            tracer=self.tracer,
        )
        checks: dict[str, Callable[[], Awaitable[None]]] = {
            "postgresql": partial(run.check, schema.check, checked)
        }
        places = {"postgresql": place_of(settings.database_url)}
        if check_redis is not None:
            checks["redis"] = check_redis
            places["redis"] = place_of(settings.redis_url)

        async def announce() -> None:
            run.bound(server.port)

        await serve_until_stopped(
            server,
            stop,
            settings.shutdown_grace,
            [
                announce,
                *always,
                partial(
                    follow_dependencies,
                    server,
                    checks,
                    stop,
                    optional=() if needs_redis else ("redis",),
                    places=places,
                    report=self.monitoring.show_dependencies,
                ),
                partial(schema.run_when_usable, run.known(loops), stop),
            ],
        )


@asynccontextmanager
async def open_process(run: AgreedRun, name: str, probes: Probes) -> AsyncIterator[ServiceProcess]:
    """Open the metrics and the traces of a service, until the end of the block.

    Raises:
        ConfigurationError: OUTBOX_METRICS_LISTEN or OUTBOX_TRACES_ENDPOINT is wrong.
    """
    async with Monitoring(name, run.settings.metrics_listen) as monitoring:
        tracer = open_tracer(run.settings, name)
        try:
            yield ServiceProcess(run, name, probes, monitoring, tracer)
        finally:
            if tracer is not None:
                await tracer.close()
