"""Serves the calls of a service, and runs its loops, until the service is stopped."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.agreed.run import AgreedRun, Work
from outbox_server.shared.database.schema import SchemaGuard
from outbox_server.shared.metrics.monitoring import Monitoring
from outbox_server.shared.process import serve_until_stopped
from outbox_server.shared.rpc.health import follow_dependencies
from outbox_server.shared.rpc.server import GrpcServer
from outbox_server.shared.store_urls import place_of


async def serve_calls(
    run: AgreedRun,
    server: GrpcServer,
    monitoring: Monitoring,
    schema: SchemaGuard,
    engine: AsyncEngine,
    *,
    loops: Sequence[Work],
    always: Sequence[Work] = (),
    check_redis: Callable[[], Awaitable[None]] | None = None,
    needs_redis: bool = True,
) -> None:
    """Serve calls until `run.stop` is set; then drain, and return.

    Health reports SERVING while PostgreSQL (by `engine`) and Redis serve. Without `check_redis`,
    the service does not use Redis. Without `needs_redis`, it also serves while Redis does not. The
    `loops` begin when the schema and the stored settings are known, those in `always` at once. All
    of them must end by themselves once `run.stop` is set.

    Raises:
        ExceptionGroup: a loop failed, or the schema is too new for this release.
    """
    settings, stop = run.settings, run.stop
    checks: dict[str, Callable[[], Awaitable[None]]] = {
        "postgresql": partial(run.check, schema.check, engine)
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
                report=monitoring.show_dependencies,
            ),
            partial(schema.run_when_usable, run.known(loops), stop),
        ],
    )
