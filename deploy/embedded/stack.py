"""The servers of the embedded stack, in one folder that one process uses at a time."""

from __future__ import annotations

import asyncio
import fcntl
import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self, TextIO

from outbox_server.deploy.child import LocalServerError
from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.postgres import PostgresServer
from outbox_server.deploy.embedded.valkey import ValkeyServer
from outbox_server.deploy.private_files import open_private, private_folder
from outbox_server.deploy.providers.embedded import EmbeddedProvider, embedded_provider
from outbox_server.deploy.providers.profile import Profile
from outbox_server.shared.errors import OutboxError


class FolderInUseError(OutboxError):
    """Another process uses the stack's folder."""

    default_reason = "FOLDER_IN_USE"


class Servers:
    """PostgreSQL, Valkey and the development inbox, running while the context is open.

    A simulated mail provider can replace the inbox; its mails go to the same Maildir.
    The folder contains `postgres/`, `valkey/`, `inbox/`, `logs/` and a lock that ends with its
    process. The servers end with the thread that opened the context, even at a kill -9.
    """

    def __init__(
        self,
        folder: Path,
        *,
        postgres_port: int | None = None,
        redis_port: int | None = None,
        smtp_port: int | None = None,
        durable: bool = True,
        inbox: bool = True,
        provider: Profile | None = None,
    ) -> None:
        """Take the folder, created if missing, and ports; None means a free port.

        If not `durable`, PostgreSQL runs without fsync, for tests. With a `provider` there is no
        inbox.
        """
        self.folder = folder.resolve()
        logs = self.folder / "logs"
        self.postgres = PostgresServer(
            self.folder / "postgres",
            port=postgres_port,
            durable=durable,
            log=logs / "postgres.log",
        )
        self.valkey = ValkeyServer(self.folder / "valkey", port=redis_port, log=logs / "valkey.log")
        self.inbox = Inbox(self._maildir, port=smtp_port) if inbox and provider is None else None
        # Known after the start.
        self.provider: EmbeddedProvider | None = None
        self._profile = provider
        self._smtp_port = smtp_port
        self._open = AsyncExitStack()

    @property
    def database_url(self) -> str:
        """The value for OUTBOX_DATABASE_URL."""
        return self.postgres.url()

    @property
    def redis_url(self) -> str:
        """The value for OUTBOX_REDIS_URL."""
        return self.valkey.url

    @property
    def smtp_url(self) -> str:
        """The value for OUTBOX_SMTP_URL."""
        return self._inbox().url if self.provider is None else self.provider.url

    @property
    def maildir(self) -> Path:
        """The Maildir of the inbox or the provider."""
        return self._inbox().maildir if self.provider is None else self.provider.store.maildir

    @property
    def record(self) -> Path:
        """The record of the inbox or the provider, for `read_record`."""
        return self._inbox().record if self.provider is None else self.provider.store.record

    async def __aenter__(self) -> Self:
        """Start everything, and create the role and the database `outbox` if missing.

        Raises:
            FolderInUseError: another process uses the folder.
            ForeignFolderError: the folder belongs to another user.
            LocalServerError: a server did not start; nothing is left running.
        """
        async with AsyncExitStack() as stack:
            # It has mails, keys and passwords. An earlier release let every user enter it.
            private_folder(self.folder)
            stack.enter_context(_lock(self.folder))
            stack.push_async_callback(self.postgres.stop)
            stack.push_async_callback(self.valkey.stop)
            started = await asyncio.gather(
                self.postgres.start(), self.valkey.start(), return_exceptions=True
            )
            for outcome in started:
                if isinstance(outcome, BaseException):
                    raise outcome
            await self.postgres.ensure_database()
            if self.inbox is not None:
                await stack.enter_async_context(self.inbox)
            if self._profile is not None:
                self.provider = embedded_provider(
                    self._profile,
                    folder=self.folder / "certificates",
                    maildir=self._maildir,
                    port=self._smtp_port,
                )
                await stack.enter_async_context(self.provider.server)
            self._open = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop the servers, in at most about 20 s, and release the folder."""
        await self._open.aclose()

    async def watch(self) -> None:
        """Wait until a server ends.

        Raises:
            LocalServerError: a server ended by itself; the text quotes its log.
        """
        servers = (self.postgres, self.valkey)
        children = {asyncio.create_task(one.child.wait()): one.child for one in servers}
        try:
            ended, _ = await asyncio.wait(children, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in children:
                task.cancel()
        child = children[ended.pop()]
        raise LocalServerError(f"{child.name} ended by itself{child.tail()}")

    @property
    def _maildir(self) -> Path:
        return self.folder / "inbox"

    def _inbox(self) -> Inbox:
        if self.inbox is None:
            raise RuntimeError("these servers have no inbox")
        return self.inbox


def _lock(folder: Path) -> TextIO:
    file = os.fdopen(open_private(folder / "lock", os.O_RDWR | os.O_APPEND | os.O_CREAT), "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "?"
        file.close()
        raise FolderInUseError(
            f"{folder} is in use by process {holder}: stop it first, or use another folder",
            metadata={"folder": str(folder), "pid": holder},
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
