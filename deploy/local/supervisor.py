"""The whole system on one machine: embedded servers, migrated, and our services, kept running."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Final, Self

from deploy.local.child import Child, LocalServerError
from deploy.local.encryption_key import key_in
from deploy.local.ports import LOOPBACK, free_port
from deploy.local.service import Service, describe_end, environment_of
from deploy.local.stack import Servers
from shared.settings import Settings

# What `up` waits for a send in flight when it stops; OUTBOX_SHUTDOWN_GRACE, if set, goes before.
_GRACE: Final = timedelta(seconds=5)
# A service that cannot start shall not take the machine with it.
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0
_DEFAULT_PORTS: Final = {"postgres": 5432, "redis": 6379, "smtp": 1025}


class LocalSystem:
    """Servers and services in one folder, running while the context is open.

    `watch` starts again what ends by itself. All of them die with this process, even at kill -9.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        *,
        dispatchers: int = 1,
        smtp_url: str | None = None,
        default_ports: bool = True,
        say: Callable[[str], None],
    ) -> None:
        """Take `settings`, of which everything counts but addresses, and what tells the user.

        `smtp_url` gets all mail, in place of the inbox. `default_ports`: each port is the usual
        one where that is free; else all are any free ones.
        """
        ports = dict.fromkeys(_DEFAULT_PORTS) if not default_ports else {
            name: free_port(port) if free_port(port) == port else None
            for name, port in _DEFAULT_PORTS.items()
        }
        self.servers = Servers(
            folder,
            postgres_port=ports["postgres"],
            redis_port=ports["redis"],
            smtp_port=ports["smtp"],
            inbox=smtp_url is None,
        )
        self.folder = self.servers.folder
        self.scheduler = ""
        self.stats = ""
        self.dispatchers: list[str] = []
        self._settings = settings
        self._wanted_dispatchers = dispatchers
        self._smtp_url = smtp_url
        self._default_ports = default_ports
        self._say = say
        self._services: list[Service] = []
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start everything; every service answers SERVING afterwards.

        Raises:
            FolderInUseError: another process holds the folder.
            LocalServerError: a server or service did not start; nothing is left running.
        """
        async with AsyncExitStack() as stack:
            # SQLAlchemy is imported while PostgreSQL starts, in a thread: both take their time.
            database = asyncio.to_thread(importlib.import_module, "shared.database")
            imported = asyncio.create_task(database)
            await stack.enter_async_context(self.servers)
            migrate = (await imported).migrate
            await asyncio.to_thread(migrate, self.servers.database_url)
            self._services = self._plan()
            stack.push_async_callback(self._stop_services)
            async with asyncio.TaskGroup() as group:
                for service in self._services:
                    group.create_task(service.start())
            self._open = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop the dispatchers, then the other services, then the servers."""
        await self._open.aclose()

    async def watch(self) -> None:
        """Start again what ends by itself, and say so; returns never."""
        postgres, valkey = self.servers.postgres, self.servers.valkey
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep("PostgreSQL", lambda: postgres.child, postgres.start))
            group.create_task(self._keep("Valkey", lambda: valkey.child, valkey.start))
            for service in self._services:
                group.create_task(
                    self._keep(service.title, lambda one=service: one.child, service.start)
                )

    async def _keep(
        self, title: str, child: Callable[[], Child], start: Callable[[], Awaitable[None]]
    ) -> None:
        while True:
            code = await child().wait()
            self._say(f"{title} {describe_end(code)}; starting it again")
            pause = _FIRST_PAUSE_S
            while True:
                try:
                    await start()
                    break
                except LocalServerError as error:
                    self._say(str(error))
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE_S)
            self._say(f"{title} is running again")

    def _plan(self) -> list[Service]:
        environment = self._environment()
        self.scheduler = self._address("scheduler", 50051)
        self.stats = self._address("stats", 50053)
        self.dispatchers = [
            self._address("dispatcher", 50052) if number == 0 else f"{LOOPBACK}:{free_port()}"
            for number in range(self._wanted_dispatchers)
        ]
        named = [("scheduler", "scheduler", self.scheduler), ("stats", "stats", self.stats)]
        for number, address in enumerate(self.dispatchers, start=1):
            title = "dispatcher" if len(self.dispatchers) == 1 else f"dispatcher-{number}"
            named.append((title, "dispatcher", address))
        return [
            Service(
                title,
                name,
                address,
                environment,
                folder=self.folder,
                log=self.folder / "logs" / f"{title}.log",
                grace=self._grace(),
            )
            for title, name, address in named
        ]

    def _environment(self) -> dict[str, str]:
        settings = self._settings
        keys = settings.encryption_keys.get_secret_value() or key_in(self.folder)
        return environment_of(settings) | {
            "OUTBOX_DATABASE_URL": self.servers.database_url,
            "OUTBOX_REDIS_URL": self.servers.redis_url,
            "OUTBOX_SMTP_URL": self._smtp_url or self.servers.smtp_url,
            "OUTBOX_SMTP_OVERRIDE": "true" if self._smtp_url else "false",
            "OUTBOX_ENCRYPTION_KEYS": keys,
            # Loopback alone, so neither keys nor TLS.
            "OUTBOX_AUTH": "off",
            "OUTBOX_TLS_CERTIFICATE": "",
            "OUTBOX_TLS_KEY": "",
            "OUTBOX_SHUTDOWN_GRACE": f"{self._grace().total_seconds()}s",
        }

    def _grace(self) -> timedelta:
        given = "shutdown_grace" in self._settings.model_fields_set
        return self._settings.shutdown_grace if given else _GRACE

    def _address(self, name: str, usual_port: int) -> str:
        if not self._default_ports:
            return f"{LOOPBACK}:{free_port()}"
        field = f"{name}_listen"
        if field in self._settings.model_fields_set:
            return str(getattr(self._settings, field))
        return f"{LOOPBACK}:{free_port(usual_port)}"

    async def _stop_services(self) -> None:
        # What sends first: the others may still be asked while it ends.
        first = [one for one in self._services if one.title.startswith("dispatcher")]
        rest = [one for one in self._services if one not in first]
        for group in (first, rest):
            await asyncio.gather(*(service.stop() for service in group))
