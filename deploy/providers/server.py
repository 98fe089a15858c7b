"""The simulated provider: an SMTP server on loopback."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from typing import Final, Self
from urllib.parse import quote

from outbox_server.deploy.child import LocalServerError
from outbox_server.deploy.mail_store import MailStore
from outbox_server.deploy.ports import LOOPBACK
from outbox_server.deploy.providers.policy import Policy, Visit, reply_of
from outbox_server.deploy.providers.profile import Profile
from outbox_server.deploy.providers.sasl import Account
from outbox_server.deploy.providers.session import Session
from outbox_server.deploy.providers.speaker import Backend
from outbox_server.deploy.providers.tally import Ending, Tally
from outbox_server.deploy.providers.wire import Wire

# Beyond this a connection is refused, whatever the profile says.
MOST_CONNECTIONS: Final = 1_000
_BACKLOG: Final = 1_024
_STOP_LIMIT_S: Final = 5.0


class Provider:
    """Serves one profile while the context is open, and counts what it accepts."""

    def __init__(
        self,
        profile: Profile,
        *,
        port: int | None = None,
        accounts: Mapping[str, Account] | None = None,
        tls: ssl.SSLContext | None = None,
        implicit_tls: bool = False,
        tally: Tally | None = None,
        store: MailStore | None = None,
    ) -> None:
        """Set up the server. `port` None means any free port.

        Without `accounts`, any name and any secret are accepted. Without `tls`, the server neither
        offers nor requires TLS. `implicit_tls` means TLS from the first byte, without STARTTLS.
        `store` keeps the mails; without it they are only counted.
        """
        self.profile = profile
        self.tally = tally or Tally()
        self.policy = Policy(profile)
        self._accounts = accounts
        self._tls = tls
        self._implicit_tls = implicit_tls
        self._store = store
        self._port = port
        self._server: asyncio.Server | None = None
        self._backend = self._make_backend(profile)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """The TCP port; known after the start.

        Raises:
            RuntimeError: the server was not started.
        """
        if self._server is None or self._port is None:
            raise RuntimeError("the provider was not started")
        return self._port

    def url(self, user: str = "") -> str:
        """Return the URL of an account, as OUTBOX_SMTP_URL takes it."""
        scheme = "smtp" if self._tls is None else "smtps" if self._implicit_tls else "smtp+starttls"
        login = ""
        if user and self._accounts is not None:
            login = f"{quote(user, safe='')}:{quote(self._accounts[user].password, safe='')}@"
        return f"{scheme}://{login}{LOOPBACK}:{self.port}"

    def become(self, profile: Profile) -> None:
        """Use another profile for all connections from now on, with unused limits."""
        self.profile = profile
        self.policy = Policy(profile)
        self._backend = self._make_backend(profile)

    async def start(self) -> None:
        """Listen.

        Raises:
            LocalServerError: the port is taken.
        """
        if self._store is not None:
            self._store.open()
        try:
            self._server = await asyncio.start_server(
                self._connected,
                LOOPBACK,
                self._port or 0,
                backlog=_BACKLOG,
                ssl=self._tls if self._implicit_tls else None,
            )
        except OSError as error:
            if self._store is not None:
                self._store.close()
            raise LocalServerError(f"the provider cannot listen: {error}") from None
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening, and cut every connection."""
        if self._server is None:
            return
        self._server.close()
        await self.cut()
        await self._server.wait_closed()
        self._server = None
        self.tally.close()
        if self._store is not None:
            self._store.close()

    async def cut(self) -> None:
        """Close every connection without a reply, as a crashing server does."""
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_LIMIT_S)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _make_backend(self, profile: Profile) -> Backend:
        return Backend(
            profile=profile,
            policy=self.policy,
            tally=self.tally,
            accounts=self._accounts,
            starttls=self._tls,
            store=self._store,
        )

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a connection is served by a task")
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:
            # By `cut`: asyncio would log a task that a stream's callback made as failed.
            writer.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        backend = self._backend
        wire = Wire(reader, writer, backend.profile.idle_s)
        if len(self._tasks) > MOST_CONNECTIONS:
            wire.say(reply_of(421, "too many connections", "4.3.2"))
            await wire.close()
            return
        peer = writer.get_extra_info("peername") or ("",)
        visit = Visit(backend.tally.opened(), str(peer[0]))
        backend.policy.enter(visit)
        ending = Ending.SERVER
        try:
            ending = await Session(backend, wire, visit).run()
        finally:
            backend.policy.leave(visit)
            backend.tally.closed(
                visit.number,
                helo=visit.helo,
                account=visit.account,
                mails=visit.accepted,
                ending=ending,
            )
        await wire.close()
