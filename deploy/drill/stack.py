"""The private stack of a drill: the embedded stack, with a proxy in front of every server."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final, Literal, Self

import grpc

from outbox_server.deploy.certificates import self_signed, server_context
from outbox_server.deploy.drill.clocks import clock_by_file, faketime_library, set_clock
from outbox_server.deploy.drill.load import WINDOW
from outbox_server.deploy.drill.plan import (
    CLOCK_KINDS,
    LEASE_S,
    ROLLOUTS,
    SINGLE_REDIS,
    SMTP_END_TIMEOUT_S,
    SMTP_TIMEOUT_S,
    STORES,
)
from outbox_server.deploy.drill.production import ProductionConfiguration
from outbox_server.deploy.drill.store_faults import StoreFaults
from outbox_server.deploy.embedded.cluster import ValkeyCluster
from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.passwords import OWNER, PasswordFile
from outbox_server.deploy.embedded.pgbouncer import PgBouncer, pooler_folder
from outbox_server.deploy.embedded.postgres import PostgresServer
from outbox_server.deploy.embedded.proxy import TcpProxy
from outbox_server.deploy.embedded.replication import Replication
from outbox_server.deploy.embedded.service import Service
from outbox_server.deploy.embedded.supervisor import LocalSystem
from outbox_server.deploy.embedded.valkey import ValkeyServer
from outbox_server.deploy.ports import LOOPBACK
from outbox_server.shared.settings import Settings, load_settings

# Long enough that a mail which meets one fault after the other does not use up all its attempts.
_BACKOFF: Final = tuple(timedelta(seconds=step) for step in (0.2, 0.5, 1, 2, *[3] * 16))
# Short, so that refused and deferred mail is sent within seconds after the fault.
_SHORT_BACKOFF: Final = tuple(timedelta(seconds=step) for step in (0.3, 0.6, 1))
_QUOTA_DAY: Final = timedelta(seconds=2)
_PHASE_LIMIT: Final = timedelta(seconds=SMTP_TIMEOUT_S)
# On three primaries, so that each has a shard or two.
_CLUSTER_SHARDS: Final = 4


@dataclass(frozen=True, slots=True)
class _Stores:
    """The cluster and the pooler that a production system has in place of single servers."""

    cluster: ValkeyCluster
    pooler: PgBouncer

    @property
    def variables(self) -> dict[str, str]:
        """The variables that lead the services to them."""
        return {
            "OUTBOX_DATABASE_URL": self.pooler.url("outbox"),
            "OUTBOX_REDIS_URL": self.cluster.url,
        }


@dataclass(frozen=True, slots=True)
class Size:
    """The number of processes of each service."""

    dispatchers: int = 2
    schedulers: int = 1
    stats: int = 1


def drill_settings(policy: Literal["resend", "hold"]) -> Settings:
    """Return the settings of the services in a drill: all times are short."""
    return load_settings(
        rate_window=WINDOW,
        # Zero, so that some senders have no gap; the others set their own.
        min_gap=timedelta(0),
        lease=timedelta(seconds=LEASE_S),
        retry_backoff=_BACKOFF,
        # Each phase instead of smtp_timeout: the reply to a body may take longer than the others.
        smtp_connect_timeout=_PHASE_LIMIT,
        smtp_greeting_timeout=_PHASE_LIMIT,
        smtp_ehlo_timeout=_PHASE_LIMIT,
        smtp_mail_timeout=_PHASE_LIMIT,
        smtp_rcpt_timeout=_PHASE_LIMIT,
        smtp_data_timeout=_PHASE_LIMIT,
        smtp_block_timeout=_PHASE_LIMIT,
        smtp_end_timeout=timedelta(seconds=SMTP_END_TIMEOUT_S),
        cooldown=_SHORT_BACKOFF,
        defer_backoff=_SHORT_BACKOFF,
        quota_day=_QUOTA_DAY,
        shutdown_grace=timedelta(seconds=3),
        uncertain_policy=policy,
        log_level="info",
        log_format="json",
    )


class DrillStack:
    """The stack, which runs while the context is open. Processes that die are started again."""

    def __init__(
        self,
        folder: Path,
        size: Size,
        settings: Settings,
        say: Callable[[str], None],
        *,
        environment: Mapping[str, str] | None = None,
        migrate: Callable[[str], None] | None = None,
        production: bool = False,
        cluster: bool = False,
    ) -> None:
        """The services get `environment` in addition. `migrate` runs before they start.

        With `production`, all connections have TLS, callers need a key, and secrets are in files.
        With `cluster`, Redis is a cluster of three primaries with replicas, and PostgreSQL has a
        synchronous replica, and is reached through PgBouncer.
        """
        if cluster:
            settings = settings.model_copy(update={"shards": _CLUSTER_SHARDS})
        self._cluster = cluster
        # The faults of the cluster, the replica and PgBouncer, once they run; None without them.
        self.stores: StoreFaults | None = None
        self._replication: Replication | None = None
        self.settings = settings
        self.size = size
        self._trusted = self_signed(folder)
        self._distrusted = self_signed(folder / "distrusted")
        self._tls = server_context(self._trusted)
        self._production = ProductionConfiguration(folder, self._trusted) if production else None
        contexts = self._production.contexts if self._production else {}
        self.proxies = {
            "postgres": TcpProxy(self._port_of_the_primary, contexts.get("postgres")),
            "redis": TcpProxy(lambda: self.valkey.port, contexts.get("redis")),
            "smtp": TcpProxy(lambda: self.inbox.port, contexts.get("smtp")),
            # The relay of senders with their own endpoint: over TLS, with a trusted certificate.
            "endpoint": TcpProxy(lambda: self.inbox.port, self._tls),
        }
        # Gives each new connection to one of the schedulers, like a Service of Kubernetes.
        self._balancer = TcpProxy(self._port_of_a_scheduler)
        # The file that sets the clock of Redis.
        self.redis_clock = folder / "redis_clock"
        self._faketime = faketime_library()
        self._folder = folder
        self._say = say
        self._environment = dict(environment or {})
        self._migrate = migrate
        self._system: LocalSystem | None = None
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start everything, and return when every service reports SERVING.

        Raises:
            LocalServerError: a server or service did not start; nothing is left running.
        """
        async with AsyncExitStack() as stack:
            for proxy in (*self.proxies.values(), self._balancer):
                await stack.enter_async_context(proxy)
            ports = {name: proxy.port for name, proxy in self.proxies.items()}
            redis_password = secrets.token_urlsafe(24)
            chosen = await self._start_stores(stack, ports) if self._cluster else None
            self._system = LocalSystem(
                self._folder,
                self.settings,
                dispatchers=self.size.dispatchers,
                schedulers=self.size.schedulers,
                stats=self.size.stats,
                through={
                    "OUTBOX_DATABASE_URL": PasswordFile(self._folder / "postgres").url(
                        ports["postgres"], "outbox", OWNER
                    ),
                    "OUTBOX_REDIS_URL": f"redis://:{redis_password}@{LOOPBACK}:{ports['redis']}/0",
                    # A name and a password are set, so that there is an AUTH to fail.
                    "OUTBOX_SMTP_URL": f"smtp://drill:drill@{LOOPBACK}:{ports['smtp']}",
                    "OUTBOX_SMTP_ALLOW": LOOPBACK,
                    "SSL_CERT_FILE": str(self._trusted.public),
                    **(
                        self._production.environment(ports, redis_password)
                        if self._production
                        else {}
                    ),
                    **({} if chosen is None else chosen.variables),
                    **self._environment,
                },
                default_ports=False,
                migrate=self._prepare if self._production else self._migrate,
                metrics=self._production is not None,
                health=self._production is not None,
                say=self._say,
            )
            self._system.servers.valkey.password = redis_password
            if self._faketime is not None:
                set_clock(self.redis_clock, 0)
                valkey = self._system.servers.valkey
                valkey.environment = clock_by_file(self._faketime, self.redis_clock)
            servers = self._system.servers
            servers.postgres.replicated = self._cluster
            if chosen is not None:
                self._replication = Replication(servers)
                stack.push_async_callback(self._replication.stop)
                self._system.keep("PgBouncer", chosen.pooler)
            await stack.enter_async_context(self._system)
            if chosen is not None and self._replication is not None:
                await self._replication.start()
                self.stores = StoreFaults(
                    chosen.cluster, chosen.pooler, self.settings.shards, self._replication
                )
            self._open = stack.pop_all()
        return self

    async def _start_stores(self, stack: AsyncExitStack, ports: Mapping[str, int]) -> _Stores:
        """Start the cluster and PgBouncer."""
        cluster = ValkeyCluster(self._folder / "cluster", replicas=(0, 1, 2))
        stack.push_async_callback(cluster.stop)
        await cluster.start()
        folder = stack.enter_context(pooler_folder())
        password = PasswordFile(self._folder / "postgres").password_of(OWNER)
        log = self._folder / "logs" / "pgbouncer.log"
        pooler = PgBouncer(folder, ports["postgres"], password, log=log)
        stack.push_async_callback(pooler.kill)
        await pooler.start()
        return _Stores(cluster, pooler)

    async def __aexit__(self, *_: object) -> None:
        """Stop everything."""
        await self._open.aclose()

    def _prepare(self, _: str) -> None:
        if self._production is not None:
            self._production.prepare_database(self.proxies["postgres"].port)

    def _port_of_the_primary(self) -> int:
        primary = self.postgres if self._replication is None else self._replication.primary
        return primary.port

    def _port_of_a_scheduler(self) -> int:
        ready = [one for one in self.system.services if one.name == "scheduler"]
        return int(random.choice(ready).address.rpartition(":")[2])

    @property
    def without_clocks(self) -> bool:
        """Whether faults of clocks are not possible here, because libfaketime is missing."""
        return self._faketime is None

    @property
    def missing(self) -> frozenset[str]:
        """The kinds of faults that are not possible here."""
        clocks = CLOCK_KINDS if self.without_clocks else frozenset()
        stores = SINGLE_REDIS if self._cluster else frozenset(STORES)
        return clocks | stores | (frozenset() if self._production else frozenset(ROLLOUTS))

    @property
    def schedulers(self) -> list[str]:
        """The addresses for callers: of each scheduler, or of what stands before all of them."""
        if self._production is not None:
            return [f"{LOOPBACK}:{self._balancer.port}"] * self.size.schedulers
        return [one.address for one in self.system.services if one.name == "scheduler"]

    @property
    def credentials(self) -> dict[str, grpc.ChannelCredentials] | None:
        """The credentials of the callers, by user; None without TLS and keys."""
        return None if self._production is None else self._production.credentials

    @property
    def system(self) -> LocalSystem:
        """The servers and services."""
        if self._system is None:
            raise RuntimeError("the stack was not started")
        return self._system

    @property
    def postgres(self) -> PostgresServer:
        """PostgreSQL itself, not its proxy."""
        return self.system.servers.postgres

    @property
    def valkey(self) -> ValkeyServer:
        """Valkey itself, not its proxy."""
        return self.system.servers.valkey

    @property
    def inbox(self) -> Inbox:
        """The SMTP side."""
        inbox = self.system.servers.inbox
        if inbox is None:
            raise RuntimeError("a drill has an inbox")
        return inbox

    def distrust(self) -> None:
        """Make the second endpoint use an untrusted certificate, until `heal`."""
        self._tls.load_cert_chain(*self._distrusted)
        self.proxies["endpoint"].cut()

    def trust(self) -> None:
        """Make the second endpoint use the trusted certificate again."""
        self._tls.load_cert_chain(*self._trusted)

    @property
    def processes(self) -> dict[str, int]:
        """The number of processes of each service, by its name."""
        return {
            "dispatcher": self.size.dispatchers,
            "scheduler": self.size.schedulers,
            "stats": self.size.stats,
        }

    @property
    def audit_settings(self) -> Settings:
        """The settings for an audit of this stack."""
        url = self.system.servers.database_url
        return self.settings.model_copy(update={"database_url": url})

    def service(self, name: str, number: int) -> Service:
        """Return a process of a service, numbered from 1."""
        return [one for one in self.system.services if one.name == name][number - 1]

    def heal(self) -> None:
        """Undo all effects of faults."""
        for proxy in self.proxies.values():
            proxy.heal()
        self.inbox.trouble = None
        self.trust()
