"""The development inbox: an SMTP server that accepts every mail and stores it in a Maildir.

To run it as a process of its own:

    python -m outbox_server.deploy.embedded.inbox --port 1025 --maildir ./inbox
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import logging
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

import uvloop
from aiosmtpd.smtp import Envelope, Session

from outbox_server.deploy.child import LocalServerError
from outbox_server.deploy.embedded.inbox_connection import InboxConnection
from outbox_server.deploy.embedded.trouble import InboxTrouble, Way
from outbox_server.deploy.mail_store import MailStore
from outbox_server.deploy.ports import LOOPBACK
from outbox_server.deploy.providers.policy import Policy
from outbox_server.deploy.record import ReceivedMail
from outbox_server.shared.smtp.replies import Phase

DEFAULT_SIZE_LIMIT: Final = 64 * 1024 * 1024


class Inbox:
    """Accepts every mail on loopback and stores its exact bytes, including CRLF.

    It offers SIZE, 8BITMIME, SMTPUTF8, and AUTH with any name and password. It refuses mail that
    RFC 5321 forbids (a line over 998 bytes).
    """

    def __init__(
        self, maildir: Path, *, port: int | None = None, size_limit: int = DEFAULT_SIZE_LIMIT
    ) -> None:
        """Take a `port`, or None for a free one, and the largest mail in bytes."""
        self.maildir = maildir
        self.mails: list[ReceivedMail] = []
        # The MAIL FROM of every mail that a trouble refused permanently.
        self.refused: list[str] = []
        self._trouble: InboxTrouble | None = None
        # The policy of a trouble that imitates a provider.
        self.policy: Policy | None = None
        self._wanted_port = port
        self._port: int | None = None
        self.size_limit = size_limit
        self._server: asyncio.Server | None = None
        self.connections: set[InboxConnection] = set()
        self._store = MailStore(maildir)
        self.numbers: Iterator[int] = itertools.count(1)

    @property
    def trouble(self) -> InboxTrouble | None:
        """The current trouble; None if there is none."""
        return self._trouble

    @trouble.setter
    def trouble(self, trouble: InboxTrouble | None) -> None:
        self._trouble = trouble
        profile = None if trouble is None else trouble.profile
        self.policy = None if profile is None else Policy(profile)
        if self.policy is not None:
            for connection in self.connections:
                self.policy.enter(connection.visit)

    @property
    def port(self) -> int:
        """The TCP port; known after the start."""
        if self._port is None:
            raise RuntimeError("the inbox was not started")
        return self._port

    @property
    def url(self) -> str:
        """The inbox's URL, as OUTBOX_SMTP_URL takes it."""
        return f"smtp://{LOOPBACK}:{self.port}"

    @property
    def record(self) -> Path:
        """The record's file, for `read_record`; `mails` has only those since the start."""
        return self._store.record

    async def start(self) -> None:
        """Listen on the running event loop, and accept mail from now on.

        Raises:
            LocalServerError: the port is taken.
        """
        # aiosmtpd logs every command at level info, which costs more than the mail itself.
        logging.getLogger("mail.log").setLevel(logging.ERROR)
        self._store.open()
        try:
            self._server = await asyncio.get_running_loop().create_server(
                functools.partial(InboxConnection, self),
                LOOPBACK,
                self._port or self._wanted_port or 0,
                backlog=1024,
            )
        except OSError as error:
            self._store.close()
            raise LocalServerError(f"the inbox cannot listen: {error}") from None
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and cut every connection. Mails that got a 250 are stored."""
        if self._server is None:
            return
        self._server.close()
        self.cut()
        await self._server.wait_closed()
        self._server = None
        self._store.close()

    def note_refusal(self, trouble: InboxTrouble, envelope: Envelope | None) -> None:
        """Record a mail that a trouble refuses permanently."""
        if trouble.for_good and envelope is not None:
            self.refused.append(envelope.mail_from or "")

    def cut(self) -> None:
        """Close every connection without a reply, like a dying server."""
        for connection in tuple(self.connections):
            connection.cut()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # The names of the hooks are aiosmtpd's.
    async def handle_DATA(
        self, connection: InboxConnection, _session: Session, envelope: Envelope
    ) -> str:
        """Store one mail. No await comes before, so it is stored completely or not at all."""
        connection.phase = "reply"
        trouble, policy = self._trouble, self.policy
        if trouble is not None and trouble.way is Way.REFUSE and trouble.phase == "reply":
            self.note_refusal(trouble, envelope)
            return trouble.text
        content = envelope.original_content or b""
        given = connection.refused_by(policy, Phase.BODY, content)
        if given is not None:
            return given.reply
        mail = self._store.add(
            content,
            started_at=connection.mail_began_at,
            mail_from=envelope.mail_from or "",
            rcpt_tos=tuple(envelope.rcpt_tos),
        )
        self.mails.append(mail)
        if policy is not None:
            policy.accept(connection.visit, time.monotonic())
            await asyncio.sleep(policy.profile.reply_delay_s)
        return f"250 2.0.0 OK: stored by {self._store.receiver_id}"


def main() -> int:
    """Run an inbox until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(
        prog="outbox_server.deploy.embedded.inbox", description=__doc__
    )
    parser.add_argument("--port", type=int, required=True, help="TCP port on 127.0.0.1; 0: free")
    parser.add_argument("--maildir", type=Path, required=True, help="folder, made if missing")
    parser.add_argument(
        "--size-limit", type=int, default=DEFAULT_SIZE_LIMIT, help="largest mail in bytes"
    )
    options = parser.parse_args()

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with Inbox(
            options.maildir, port=options.port, size_limit=options.size_limit
        ) as inbox:
            sys.stderr.write(f"inbox at {inbox.url}, mails in {inbox.maildir}\n")
            await stop.wait()

    with contextlib.suppress(KeyboardInterrupt):
        try:
            uvloop.run(run())
        except LocalServerError as error:
            sys.stderr.write(f"{error}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
