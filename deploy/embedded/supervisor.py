"""Runs the whole system on one machine: embedded servers and our services. Restarts dead ones."""

from __future__ import annotations

import asyncio
import importlib
import signal
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Final, Self

from outbox_server.deploy.child import LocalServerError
from outbox_server.deploy.embedded.encryption_key import key_in
from outbox_server.deploy.embedded.gateway import EmbeddedGateway
from outbox_server.deploy.embedded.operator_key import operator_key_in
from outbox_server.deploy.embedded.restarting import Restartable, Restarter
from outbox_server.deploy.embedded.service import Service, environment_of
from outbox_server.deploy.embedded.stack import Servers
from outbox_server.deploy.ports import LOOPBACK, claim_port, free_port
from outbox_server.deploy.providers.profile import Profile
from outbox_server.shared.settings import Settings
from outbox_server.shared.smtp_ports import ANY

# How long `up` waits for a send in flight when it stops, unless OUTBOX_SHUTDOWN_GRACE is set.
_GRACE: Final = timedelta(seconds=5)
_SERVER_PORTS: Final = {"postgres": 5432, "redis": 6379, "smtp": 1025}
_SERVICE_PORTS: Final = {"scheduler": 50051, "dispatcher": 50052, "stats": 50053}
GATEWAY_PORT: Final = 8080
_PORT_TRIES: Final = 5


class LocalSystem:
    """Servers and services in one folder, running while the context is open.

    A process that ends by itself is started again and reported to `say`. All processes end with
    this one, even at a kill -9.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        *,
        dispatchers: int = 1,
        schedulers: int = 1,
        stats: int = 1,
        smtp_url: str | None = None,
        provider: Profile | None = None,
        gateway: bool = False,
        through: Mapping[str, str] | None = None,
        default_ports: bool = True,
        migrate: Callable[[str], None] | None = None,
        metrics: bool = False,
        health: bool = False,
        keys: bool = False,
        hold: bool = False,
        say: Callable[[str], None],
    ) -> None:
        """Take `settings`, whose addresses are ignored, and `say`, which informs the user.

        `smtp_url` or a simulated `provider` gets all mail instead of the inbox. With a `gateway`,
        Envoy serves the API as REST. `through` has OUTBOX_* variables by which services reach the
        servers, such as proxies. With `default_ports` each port is the usual one if that is free;
        otherwise all are any free ones. `migrate` gets the URL of the database, in place of the
        migrations of this release. With `metrics` each service serves its metrics at a free port,
        and with `health` it answers health checks without TLS at another one. With `keys`, callers
        need an API key, and the folder has one of an operator. With `hold`, nothing is sent until
        an operator releases it.
        """
        # The reservations of the servers' usual ports, from now until the end.
        self._claims: list[socket.socket] = []
        # None means a free port, and another one if another program takes it meanwhile.
        ports = {
            name: port if default_ports and self._claims_port(port) else None
            for name, port in _SERVER_PORTS.items()
        }
        self.servers = Servers(
            folder,
            postgres_port=ports["postgres"],
            redis_port=ports["redis"],
            smtp_port=ports["smtp"],
            inbox=smtp_url is None,
            provider=provider,
        )
        self.folder = self.servers.folder
        self._settings = settings
        self._wanted = {"scheduler": schedulers, "stats": stats, "dispatcher": dispatchers}
        self._through = dict(through or {})
        self._smtp_url = smtp_url
        self._default_ports = default_ports
        self._migrate = migrate
        self._metrics = metrics
        self._health = health
        self._keys = keys
        self._hold = hold
        # The file with the operator's key; None if callers need none.
        self.operator_key: Path | None = None
        self._services: list[Service] = []
        # How many processes of each service were ever planned, for their titles.
        self._planned = Counter(self._wanted)
        self._with_gateway = gateway
        self._gateway: EmbeddedGateway | None = None
        self._restarter = Restarter(say)
        self._restarts: asyncio.Task[None] | None = None
        self._open = AsyncExitStack()

    def _claims_port(self, port: int) -> bool:
        """Claim a usual port; False if it is taken, or claimed by another stack."""
        claim = claim_port(port)
        if claim is None:
            return False
        if free_port(port) != port:
            claim.close()
            return False
        self._claims.append(claim)
        return True

    async def __aenter__(self) -> Self:
        """Start everything, and return when every service reports SERVING.

        Raises:
            FolderInUseError: another process uses the folder.
            LocalServerError: a server or service did not start; nothing is left running.
        """
        async with AsyncExitStack() as stack:
            for claim in self._claims:
                stack.callback(claim.close)
            # Import SQLAlchemy in a thread while PostgreSQL starts, because both are slow.
            database = asyncio.to_thread(
                importlib.import_module, "outbox_server.shared.database.migrating"
            )
            imported = asyncio.create_task(database)
            await stack.enter_async_context(self.servers)
            migrate = self._migrate or (await imported).migrate
            await asyncio.to_thread(migrate, self.servers.database_url)
            if self._hold:
                # Imported here because it imports SQLAlchemy, and after the thread above.
                holds = importlib.import_module("outbox_server.shared.holds.requesting")
                url = self.servers.database_url
                await holds.request_hold(self._settings.model_copy(update={"database_url": url}))
            if self._keys:
                self.operator_key = await asyncio.to_thread(
                    operator_key_in, self.folder, self.servers.database_url
                )
            self._services = self._plan(stack)
            for service in self._services:
                service.begin_log()
            stack.push_async_callback(self._stop_services)
            started = await asyncio.gather(
                *(self._first_start(service) for service in self._services),
                return_exceptions=True,
            )
            for outcome in started:
                if outcome is not None:
                    raise outcome
            if self._with_gateway:
                self._gateway = self._plan_gateway(stack)
                stack.push_async_callback(self._gateway.stop)
                await self._gateway.start()
            self._keep_all()
            self._restarts = asyncio.create_task(self._restarter.run())
            stack.push_async_callback(_cancel, self._restarts)
            self._open = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop the gateway, the dispatchers, the other services, then the servers."""
        await self._open.aclose()

    @property
    def scheduler(self) -> str:
        """The scheduler's address."""
        return self._addresses("scheduler")[0]

    @property
    def stats(self) -> str:
        """The stats service's address."""
        return self._addresses("stats")[0]

    @property
    def dispatchers(self) -> list[str]:
        """The dispatchers' addresses."""
        return self._addresses("dispatcher")

    @property
    def gateway_url(self) -> str | None:
        """The URL of the REST API; None without a gateway."""
        return None if self._gateway is None else self._gateway.url

    @property
    def services(self) -> list[Service]:
        """Our own services, in the order in which they start."""
        return list(self._services)

    async def watch(self) -> None:
        """Wait for ever, while processes that end by themselves are started again."""
        if self._restarts is not None:
            await asyncio.shield(self._restarts)

    def _keep_all(self) -> None:
        servers = self.servers
        self._restarter.keep("PostgreSQL", lambda: servers.postgres)
        self._restarter.keep("Valkey", lambda: servers.valkey)
        for service in self._services:
            self.keep(service.title, service)
        if self._gateway is not None:
            self.keep("the gateway", self._gateway)

    def keep(self, title: str, server: Restartable) -> None:
        """Start a server again whenever it ends."""
        self._restarter.keep(title, lambda: server)

    async def add(self, name: str) -> Service:
        """Start one more process of a service, and return it when it reports SERVING.

        Raises:
            LocalServerError: it did not start; nothing is left running.
        """
        self._planned[name] += 1
        number = self._planned[name]
        address = f"{LOOPBACK}:{free_port()}"
        service = self._service(f"{name}-{number}", name, address, self._environment())
        await self._first_start(service)
        self._services.append(service)
        self.keep(service.title, service)
        return service

    async def remove(self, service: Service, limit_s: float) -> bool:
        """End a process for good, by SIGTERM; False if SIGKILL had to follow after `limit_s`."""
        self._services.remove(service)
        await self._restarter.forget(service.title)
        if not service.child.running:
            return True
        service.child.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(limit_s):
                await service.child.wait()
        except TimeoutError:
            return False
        finally:
            await service.child.stop()
        return True

    async def _first_start(self, service: Service) -> None:
        for tries_left in reversed(range(_PORT_TRIES)):
            try:
                await service.start()
            except LocalServerError as error:
                given = f"{service.name}_listen" in self._settings.model_fields_set
                if given or not tries_left or "cannot be bound" not in str(error):
                    raise
                # Another process took the port between the check and the start.
                service.move(f"{LOOPBACK}:{free_port()}")
            else:
                return

    def _plan(self, stack: AsyncExitStack) -> list[Service]:
        environment = self._environment()
        titles = [
            (f"{name}-{number}" if wanted > 1 else name, name, number)
            for name, wanted in self._wanted.items()
            for number in range(1, wanted + 1)
        ]
        return [
            self._service(title, name, self._address(name, number, stack), environment)
            for title, name, number in titles
        ]

    def _service(
        self, title: str, name: str, address: str, environment: Mapping[str, str]
    ) -> Service:
        return Service(
            title,
            name,
            address,
            environment,
            folder=self.folder,
            log=self.folder / "logs" / f"{title}.log",
            grace=self._grace(),
            metrics=self._metrics,
            health=self._health,
        )

    def _plan_gateway(self, stack: AsyncExitStack) -> EmbeddedGateway:
        processes = {name: self._addresses(name)[0] for name in self._wanted}
        claim = claim_port(GATEWAY_PORT) if self._default_ports else None
        if claim is not None:
            stack.enter_context(claim)
        free = claim is not None and free_port(GATEWAY_PORT) == GATEWAY_PORT
        return EmbeddedGateway(
            self.folder / "gateway",
            processes,
            port=GATEWAY_PORT if free else None,
            log=self.folder / "logs" / "gateway.log",
        )

    def _environment(self) -> dict[str, str]:
        settings = self._settings
        keys = settings.encryption_keys.get_secret_value() or key_in(self.folder)
        return environment_of(settings) | {
            "OUTBOX_DATABASE_URL": self.servers.database_url,
            "OUTBOX_REDIS_URL": self.servers.redis_url,
            "OUTBOX_SMTP_URL": self._smtp_url or self.servers.smtp_url,
            # A simulated provider gets all mail too, so that its record suffices for an audit.
            "OUTBOX_SMTP_OVERRIDE": "true" if self._smtp_url or self.servers.provider else "false",
            "OUTBOX_ENCRYPTION_KEYS": keys,
            # The services listen on loopback only, so they need no TLS.
            "OUTBOX_AUTH": "keys" if self._keys else "off",
            "OUTBOX_TLS_CERTIFICATE": "",
            "OUTBOX_TLS_KEY": "",
            "OUTBOX_TLS_CLIENT_CA": "",
            # Users who try Outbox may have a mail server on this machine.
            "OUTBOX_SMTP_ALLOW": settings.smtp_allow or "127.0.0.0/8,::1",
            "OUTBOX_SMTP_PORTS": _ports(settings),
            "OUTBOX_SHUTDOWN_GRACE": f"{self._grace().total_seconds()}s",
            **self._trust(),
            **self._through,
        }

    def _trust(self) -> dict[str, str]:
        """Return the variables that make the services trust a simulated provider's certificate."""
        if self.servers.provider is None:
            return {}
        return {"OUTBOX_SMTP_CA": str(self.servers.provider.certificate)}

    def _grace(self) -> timedelta:
        given = "shutdown_grace" in self._settings.model_fields_set
        return self._settings.shutdown_grace if given else _GRACE

    def _addresses(self, name: str) -> list[str]:
        return [service.address for service in self._services if service.name == name]

    def _address(self, name: str, number: int, stack: AsyncExitStack) -> str:
        if not self._default_ports or number > 1:
            return f"{LOOPBACK}:{free_port()}"
        field = f"{name}_listen"
        if field in self._settings.model_fields_set:
            return str(getattr(self._settings, field))
        usual = _SERVICE_PORTS[name]
        claim = claim_port(usual)
        if claim is None:
            return f"{LOOPBACK}:{free_port()}"
        stack.enter_context(claim)
        return f"{LOOPBACK}:{free_port(usual)}"

    async def _stop_services(self) -> None:
        # Stop the dispatchers first: the other services stay available meanwhile.
        for sends in (True, False):
            group = [one for one in self._services if (one.name == "dispatcher") == sends]
            await asyncio.gather(*(service.stop() for service in group))


def _ports(settings: Settings) -> str:
    """Return OUTBOX_SMTP_PORTS if it is set, else any: a stack to try out may use any port."""
    return settings.smtp_ports if "smtp_ports" in settings.model_fields_set else ANY


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
