"""The health port: `grpc.health.v1` without TLS and without keys, for a kubelet's probes.

A kubelet speaks no TLS to gRPC, and has no client certificate. If a command were the probe, each
run would take 0.3 s of a core to start Python and import grpc. The port only tells whether the
process lives and is ready, and which store has which kind of trouble. It shows no host and no text
of a server.

- `liveness` is SERVING as long as the event loop runs. It depends on no store: a restart does not
  bring PostgreSQL back. A process whose loop hangs does not answer, and is restarted.
- `readiness`, as the empty name, is what the service's own port says: SERVING while its stores
  serve, and no longer after SIGTERM. Otherwise the trailing metadata say why.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from outbox_server.shared.rpc.addresses import bind, check_address
from outbox_server.shared.rpc.connections import ConnectionGuard, connection_options
from outbox_server.shared.rpc.health import Health
from outbox_server.shared.settings import Settings

LIVENESS: Final = "liveness"
READINESS: Final = "readiness"
# The trailing metadata of an answer NOT_SERVING: `redis: out of memory`.
REASON_KEY: Final = "outbox-reason"

_VARIABLE: Final = "OUTBOX_HEALTH_LISTEN"
# The maximum number of connections at once, of all peers and of one. Further ones are closed. A
# kubelet opens one for each probe; a load balancer keeps some open.
CONNECTIONS: Final = 200
_CONNECTIONS_PER_PEER: Final = 8
# The maximum number of calls of one connection, and of all connections, so that no peer can take
# all calls.
_STREAMS: Final = 4
_CALLS: Final = 100
_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),
    # Anyone in the network may call, so the limits are low: a request is a name, and a connection
    # needs few streams.
    ("grpc.max_receive_message_length", 1024),
    ("grpc.max_concurrent_streams", _STREAMS),
    # Idle connections, and connections whose handshake or call does not end, are closed soon,
    # because their places are needed.
    ("grpc.settings_timeout", 5_000),
    ("grpc.max_connection_age_ms", 60_000),
    ("grpc.max_connection_age_grace_ms", 5_000),
)


class Probes(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """Answers probes. Not ready until it follows the health of a server that is ready."""

    def __init__(self) -> None:
        self._health = Health([READINESS])

    def follow(self, health: Health) -> None:
        """Report the readiness of `health` from now on."""
        self._health = health

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        """Return the state of `liveness`, `readiness` or the empty name."""
        status = health_pb2.HealthCheckResponse
        if request.service == LIVENESS:
            return status(status=status.SERVING)
        if request.service not in ("", READINESS):
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"there is no probe {request.service!r}; ask for {LIVENESS} or {READINESS}",
            )
        if self._health.serving:
            return status(status=status.SERVING)
        context.set_trailing_metadata(((REASON_KEY, self._health.reason),))
        return status(status=status.NOT_SERVING)


@asynccontextmanager
async def open_probes(settings: Settings) -> AsyncIterator[Probes]:
    """Answer probes on OUTBOX_HEALTH_LISTEN, if it is set, until the end of the process.

    It opens before anything waits for a store, and closes after the drain.

    Raises:
        ConfigurationError: the address is malformed, or cannot be bound.
    """
    probes = Probes()
    if not settings.health_listen:
        yield probes
        return
    check_address(_VARIABLE, settings.health_listen)
    options = (*_OPTIONS, *connection_options(CONNECTIONS))
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=_CALLS)
    health_pb2_grpc.add_HealthServicer_to_server(probes, server)
    port = await bind(server, _VARIABLE, settings.health_listen)
    await server.start()
    guard = ConnectionGuard(port, _CONNECTIONS_PER_PEER)
    guard.start()
    structlog.get_logger("outbox.probes").info("answering probes", port=port)
    try:
        yield probes
    finally:
        await server.stop(None)
        await guard.stop()
