"""The gRPC server of all three services: interceptor, health, reflection, TLS, limits, drain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.auth.authenticator import KeyAuthenticator
from outbox_server.shared.auth.store import ApiKeyStore
from outbox_server.shared.callers import Authenticator, LocalAuthenticator, is_loopback
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.fair_shares import FairShares
from outbox_server.shared.metrics.monitoring import Monitoring
from outbox_server.shared.rpc import health
from outbox_server.shared.rpc.addresses import bind, check_address
from outbox_server.shared.rpc.calls import CallInterceptor
from outbox_server.shared.rpc.connections import ConnectionGuard, connection_options
from outbox_server.shared.rpc.probes import Probes
from outbox_server.shared.rpc.reflection import add_reflection
from outbox_server.shared.rpc.tls import server_credentials
from outbox_server.shared.settings import Settings
from outbox_server.shared.user_quotas import UserQuotas

if TYPE_CHECKING:
    from outbox_server.shared.traces.tracer import Tracer

_MIB: Final = 1024 * 1024

# A CSV of 4 MiB and the other fields of its request.
MAX_REQUEST_BYTES: Final = 5 * _MIB
MAX_RESPONSE_BYTES: Final = 16 * _MIB

# How long a draining server still accepts calls while others are in progress. Load balancers notice
# the drain within this time, so no call is refused.
_LAME_DUCK: Final = timedelta(seconds=5)

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
    # A second server on the same port must fail instead of sharing the calls.
    ("grpc.so_reuseport", 0),
    # Detects peers that vanished; more often than the idle limits of load balancers.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Watchers send nothing for a long time, so their keepalive pings must be accepted.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # How much of a waiting call's request arrives before it is read. Without this, grpc measures
    # the network, and raises the limit up to the size of a whole upload.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 256 * 1024),
    # A client delays further calls. Without a bound, one connection could fill our memory.
    ("grpc.max_concurrent_streams", 1_000),
    # Clients of a Kubernetes service find new pods only when they connect again. Streams in
    # progress are not cut.
    ("grpc.max_connection_age_ms", 30 * 60_000),
)


@dataclass(frozen=True, slots=True)
class ServiceBinding:
    """A service: its full name (`outbox.v1.SenderService`), and the function that adds it."""

    name: str
    add: Callable[[grpc.aio.Server], None]
    # By the method's name: places for methods that do not use the common places of all calls.
    shares: Mapping[str, FairShares] = field(default_factory=dict)


class GrpcServer:
    """A gRPC server with all that the three services have in common.

    Its health reports NOT_SERVING until `set_serving(True)`.
    """

    def __init__(
        self,
        settings: Settings,
        listen: str,
        services: Sequence[ServiceBinding],
        *,
        engine: AsyncEngine | None = None,
        probes: Probes | None = None,
        monitoring: Monitoring | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """Check the settings, without binding. `listen` is `host:port`; port 0 means any free one.

        `engine` reads the API keys for OUTBOX_AUTH=keys; `probes` then report the server's health.
        `monitoring` counts the calls, and `tracer` makes their spans.

        Raises:
            ConfigurationError: OUTBOX_AUTH, OUTBOX_TLS_* or the address is wrong.
        """
        self._listen = listen
        self._variable = _variable_of(settings, listen)
        check_address(self._variable, listen)
        self._services = tuple(services)
        self._names = [service.name for service in services]
        self._credentials = server_credentials(settings)
        self._authenticator = _authenticator(
            settings, self._variable, listen, engine, encrypted=self._credentials is not None
        )
        shares = {
            f"/{service.name}/{method}": shared
            for service in services
            for method, shared in service.shares.items()
        }
        monitoring = monitoring or Monitoring("server")
        monitoring.show_serving(lambda: self.serving)
        self._calls = CallInterceptor(
            self._authenticator, shares=shares, metrics=monitoring.calls, tracer=tracer
        )
        self._health = health.Health(self._names)
        if probes is not None:
            probes.follow(self._health)
        self._log = structlog.get_logger("outbox.server").bind(services=self._names)
        self._draining = False
        self._server: grpc.aio.Server | None = None
        self._port: int | None = None
        self._connections = settings.connections
        self._per_peer = settings.connections_per_peer
        self._guard: ConnectionGuard | None = None

    @property
    def port(self) -> int:
        """The port that it listens on; `start` binds it.

        Raises:
            RuntimeError: it was not started.
        """
        if self._port is None:
            raise RuntimeError("the server was not started")
        return self._port

    @property
    def serving(self) -> bool:
        """Whether health reports SERVING."""
        return self._health.serving

    async def start(self) -> None:
        """Bind the port and accept calls. Health reports NOT_SERVING until `set_serving(True)`.

        Raises:
            ConfigurationError: the address cannot be bound; the text names its variable.
        """
        options = (*_OPTIONS, *connection_options(self._connections))
        server = grpc.aio.server(interceptors=(self._calls,), options=options)
        for service in self._services:
            service.add(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        add_reflection((*self._names, health.SERVICE_NAME), server)
        self._port = await bind(server, self._variable, self._listen, self._credentials)
        await server.start()
        self._server = server
        if not self._listen.startswith("unix:"):
            self._guard = ConnectionGuard(self._port, self._per_peer)
            self._guard.start()
        self._log.info("listening", port=self._port, tls=self._credentials is not None)

    def set_serving(self, serving: bool, reason: str = "") -> None:
        """Set whether health reports SERVING, or why not. During a drain it is NOT_SERVING."""
        if not self._draining:
            self._health.set(serving=serving, reason=reason)

    def begin_drain(self) -> None:
        """Report NOT_SERVING from now on, but still accept calls."""
        self._draining = True
        self._health.set(serving=False, reason="the process stops")

    async def drain_and_stop(self, grace: timedelta) -> None:
        """Stop within `grace`: let calls finish, end the watches, then cancel the rest.

        New calls are still accepted while others are in progress, for at most 5 s and half of
        `grace`. Then clients are told to close their connections.
        """
        if self._server is None:
            return
        loop = asyncio.get_running_loop()
        end = loop.time() + grace.total_seconds()
        self.begin_drain()
        self._calls.end_streams()
        try:
            async with asyncio.timeout(min(_LAME_DUCK, grace / 2).total_seconds()):
                await self._calls.wait_until_idle()
        except TimeoutError:
            self._log.info("draining: calls are still in progress")
        await self._server.stop(max(end - loop.time(), 0))
        if self._guard is not None:
            await self._guard.stop()
        await self._authenticator.close()
        self._log.info("stopped")


def _authenticator(
    settings: Settings, variable: str, listen: str, engine: AsyncEngine | None, *, encrypted: bool
) -> Authenticator:
    """Return the authenticator for OUTBOX_AUTH.

    Raises:
        ConfigurationError: `off` beyond loopback, or keys would cross a network unencrypted.
    """
    loopback = is_loopback(listen)
    if settings.auth == "off":
        if not loopback:
            raise ConfigurationError(
                "OUTBOX_AUTH=off is accepted only by a server that listens on loopback, and other "
                f"machines can reach {listen}; listen on 127.0.0.1 or [::1], or set "
                "OUTBOX_AUTH=keys"
            )
        return LocalAuthenticator()
    if not (loopback or encrypted or settings.plaintext):
        raise ConfigurationError(
            f"{variable}: other machines can reach {listen}, and API keys would be sent there "
            "unencrypted; set OUTBOX_TLS_CERTIFICATE and OUTBOX_TLS_KEY, listen on 127.0.0.1 or "
            "[::1], or set OUTBOX_PLAINTEXT=true if a proxy or mesh encrypts"
        )
    if engine is None:
        raise ConfigurationError("OUTBOX_AUTH=keys: this server has no database with API keys")
    return KeyAuthenticator(ApiKeyStore(engine, UserQuotas.from_settings(settings)))


def _variable_of(settings: Settings, listen: str) -> str:
    """Return the name of the variable that has the value `listen`, for messages."""
    for name in type(settings).model_fields:
        if name.endswith("_listen") and getattr(settings, name) == listen:
            return f"OUTBOX_{name.upper()}"
    return "listen address"
