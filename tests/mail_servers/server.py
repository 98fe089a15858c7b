"""The common parts of the three mail servers: account, certificate, port, delivered mail."""

from __future__ import annotations

import asyncio
import contextlib
import email.policy
import os
import smtplib
import ssl
from abc import ABC, abstractmethod
from dataclasses import dataclass
from email.message import EmailMessage
from email.parser import BytesParser
from functools import cached_property
from pathlib import Path
from typing import Final, Self

from outbox_server.deploy.child import Child, LocalServerError
from outbox_server.deploy.ports import LOOPBACK, free_port
from tests.mail_servers.authority import Authority
from tests.mail_servers.root import Root

USERNAME: Final = "outbox"
PASSWORD: Final = "correct horse battery"
# The servers accept mail for r, r1, r2 and so on of this domain, and deliver it to one Maildir.
DOMAIN: Final = "y.test"
# The recipient that is refused permanently at RCPT.
UNKNOWN: Final = f"unknown@{DOMAIN}"
MAILDIR: Final = "var/mail/inbox"
_START_LIMIT: Final = 30.0
# The first header that Outbox writes; headers before it were added in transit.
_FIRST_HEADER: Final = b"From: "


@dataclass(frozen=True)
class DeliveredMail:
    """A mail in the server's Maildir."""

    stored: bytes

    @cached_property
    def trace(self) -> str:
        """The headers that the server added before the mail's own."""
        return self.stored[: self._start].decode()

    @cached_property
    def parsed(self) -> EmailMessage:
        """The mail as Outbox sent it, without the server's headers."""
        parser = BytesParser(EmailMessage, policy=email.policy.default)
        return parser.parsebytes(self.stored[self._start :])

    @cached_property
    def message_id(self) -> str:
        return str(self.parsed["Message-ID"])

    @cached_property
    def _start(self) -> int:
        if self.stored.startswith(_FIRST_HEADER):
            return 0
        return self.stored.index(b"\n" + _FIRST_HEADER) + 1


def files_below(folder: Path) -> list[str]:
    """Return the names of all files below a folder. Its subfolders may vanish meanwhile."""
    return [name for _, _, files in os.walk(folder) for name in files]


class MailServer(ABC):
    """A real mail server in its own root folder, on a free loopback port.

    It requires AUTH after STARTTLS from every client. `settings` are lines of its own
    configuration, which a variant adds. Their syntax is the server's.
    """

    name: str

    def __init__(self, folder: Path, authority: Authority, settings: str = "") -> None:
        """Prepare the server in `folder`, which must not exist."""
        self.authority = authority
        self.settings = settings
        self.port = free_port()
        self.root = Root(self.name, folder)
        certificate = authority.sign()
        self.root.write("etc/mail.crt", certificate.certificate)
        self.root.write("etc/mail.key", certificate.key, mode=0o600)
        self._prepare()
        self._child: Child | None = None

    @abstractmethod
    def _prepare(self) -> None:
        """Make folders and accounts that do not depend on the port."""

    @abstractmethod
    def _configure(self) -> Child:
        """Write the configuration for the current port; return the server's main process."""

    @abstractmethod
    def queued(self) -> int:
        """Return the number of accepted mails that are not delivered yet."""

    @abstractmethod
    def log(self) -> str:
        """Return the server's log."""

    async def start(self) -> None:
        """Start; return when the port sends its greeting.

        Raises:
            LocalServerError: it did not start; the text quotes its log.
        """
        child = self._configure()
        child.start()
        try:
            await child.until_ready(self._listens, _START_LIMIT)
        except LocalServerError as error:
            await self.root.end_processes()
            raise LocalServerError(f"{error.message}\n{self.log()}") from None
        self._child = child

    async def stop(self) -> None:
        """End every process of the server and remove its folder."""
        await self.root.end_processes()
        if self._child is not None:
            await self._child.wait()
        await asyncio.to_thread(self.root.remove)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _listens(self) -> bool:
        """Return whether one of the server's own processes accepts connections on the port."""
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(LOOPBACK, self.port)
            writer.close()
            await writer.wait_closed()
            return True
        return False

    def mails(self) -> list[DeliveredMail]:
        """Return the delivered mails, oldest first."""
        folder = self.root.path / MAILDIR / "new"
        if not folder.exists():
            return []
        files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        return [DeliveredMail(file.read_bytes()) for file in files]

    def authenticate(self, client: smtplib.SMTP) -> None:
        """Encrypt a session of the standard library's client and log in."""
        client.starttls(context=ssl.create_default_context(cadata=self.authority.pem))
        client.login(USERNAME, PASSWORD)
