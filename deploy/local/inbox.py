"""The development inbox: an SMTP server that takes every mail and stores it in a Maildir.

As a process of its own: `python -m deploy.local.inbox --port 1025 --maildir ./inbox`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import AnyStr, Final, Self

import uvloop
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session

from deploy.local.child import LocalServerError
from deploy.local.ports import LOOPBACK
from deploy.local.record import MESSAGE_ID, ReceivedMail, RecordFile
from deploy.local.trouble import LONG_LINE, Trouble, Way

DEFAULT_SIZE_LIMIT: Final = 64 * 1024 * 1024
_HOSTNAME: Final = "inbox.localhost"
_END_OF_HEADERS: Final = b"\r\n\r\n"


class Inbox:
    """Takes every mail on loopback and stores it as it came, byte by byte, CRLF included.

    The Maildir (`tmp`, `new`, `cur`) opens with the standard library's `mailbox.Maildir` and with
    mail programs; `record.jsonl` in it says what the SMTP side saw. Nothing is synced to disk.
    Offers SIZE, 8BITMIME and SMTPUTF8, and AUTH, where any name and password will do; refuses what
    RFC 5321 forbids (a line over 998 bytes).
    """

    def __init__(
        self, maildir: Path, *, port: int | None = None, size_limit: int = DEFAULT_SIZE_LIMIT
    ) -> None:
        """Take a `port`, or None for a free one, and the largest mail in bytes."""
        self.maildir = maildir
        self.mails: list[ReceivedMail] = []
        self.trouble: Trouble | None = None
        # The MAIL FROM of every mail that a trouble refused for good.
        self.refused: list[str] = []
        self._wanted_port = port
        self._port: int | None = None
        self._size_limit = size_limit
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._record: RecordFile | None = None
        # Unique by maildir(5): time, process, number within it.
        self._serial = itertools.count(1)

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
        """The record's file, for `read_record`; `mails` holds those since the start."""
        return self.maildir / "record.jsonl"

    async def start(self) -> None:
        """Listen on the running event loop; a mail is refused to nobody from now on.

        Raises:
            LocalServerError: the port is taken.
        """
        for name in ("tmp", "new", "cur"):
            (self.maildir / name).mkdir(parents=True, exist_ok=True)
        # aiosmtpd logs every command at level info, which costs more than the mail itself.
        logging.getLogger("mail.log").setLevel(logging.ERROR)
        self._record = RecordFile(self.record)
        try:
            self._server = await asyncio.get_running_loop().create_server(
                functools.partial(_Connection, self),
                LOOPBACK,
                self._port or self._wanted_port or 0,
                backlog=1024,
            )
        except OSError as error:
            self._record.close()
            raise LocalServerError(f"the inbox cannot listen: {error}") from None
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and cut every connection; what was answered with 250 is stored."""
        if self._server is None or self._record is None:
            return
        self._server.close()
        self.cut()
        await self._server.wait_closed()
        self._server = None
        self._record.close()

    def note_refusal(self, trouble: Trouble, envelope: Envelope | None) -> None:
        """Remember a mail that a trouble refuses for good."""
        if trouble.for_good and envelope is not None:
            self.refused.append(envelope.mail_from or "")

    def cut(self) -> None:
        """Close every connection without a word, as a dying server does."""
        for connection in tuple(self._connections):
            connection.cut()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # The names of the hooks are aiosmtpd's.
    async def handle_DATA(  # noqa: N802
        self, connection: _Connection, _session: Session, envelope: Envelope
    ) -> str:
        """Store one mail. Awaits nothing, so that it happens whole or, if killed, not at all."""
        connection.phase = "reply"
        trouble = self.trouble
        if trouble is not None and trouble.way is Way.REFUSE and trouble.phase == "reply":
            self.note_refusal(trouble, envelope)
            return trouble.text
        received_at = time.time()
        content = envelope.original_content or b""
        headers = content[: content.find(_END_OF_HEADERS) + 2] or content
        message_id = MESSAGE_ID.search(headers)
        file = f"{received_at:.6f}".replace(".", ".M") + f"P{os.getpid()}Q{next(self._serial)}"
        name = f"{file}.{_HOSTNAME}"
        mail = ReceivedMail(
            started_at=connection.mail_began_at,
            received_at=received_at,
            mail_from=envelope.mail_from or "",
            rcpt_tos=tuple(envelope.rcpt_tos),
            message_id=message_id[1].decode("utf-8", "replace") if message_id else "",
            bytes=len(content),
            file=name,
        )
        self._store(name, content, mail)
        return "250 2.0.0 OK"

    def _store(self, name: str, content: bytes, mail: ReceivedMail) -> None:
        if self._record is None:
            raise RuntimeError("the inbox was not started")
        written = self.maildir / "tmp" / name
        written.write_bytes(content)
        written.rename(self.maildir / "new" / name)
        self._record.append(mail)
        self.mails.append(mail)


class _Connection(SMTP):
    """aiosmtpd's protocol, with the time of MAIL FROM, and known to the inbox while it is open."""

    def __init__(self, inbox: Inbox) -> None:
        super().__init__(
            inbox,
            hostname=_HOSTNAME,
            ident="Outbox development inbox",
            data_size_limit=inbox._size_limit,  # noqa: SLF001 - of one module
            enable_SMTPUTF8=True,
            auth_require_tls=False,
            authenticator=_welcome,
            loop=asyncio.get_running_loop(),
        )
        self._inbox = inbox
        self.mail_began_at = 0.0
        # In which the next reply is given; empty: in none that a trouble may have.
        self.phase = "greeting"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._inbox._connections.add(self)  # noqa: SLF001 - of one module
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._inbox._connections.discard(self)  # noqa: SLF001 - of one module
        super().connection_lost(error)

    async def smtp_EHLO(self, arg: str) -> None:  # noqa: N802
        self.phase = "ehlo"
        await super().smtp_EHLO(arg)
        self.phase = ""

    async def smtp_AUTH(self, arg: str) -> None:  # noqa: N802
        self.phase = "auth"
        await super().smtp_AUTH(arg)

    async def smtp_MAIL(self, arg: str | None) -> None:  # noqa: N802
        self.mail_began_at = time.time()
        self.phase = "mail"
        await super().smtp_MAIL(arg)

    async def smtp_RCPT(self, arg: str | None) -> None:  # noqa: N802
        self.phase = "rcpt"
        await super().smtp_RCPT(arg)

    async def smtp_DATA(self, arg: str) -> None:  # noqa: N802
        self.phase = "data"
        await super().smtp_DATA(arg)

    async def push(self, status: AnyStr) -> None:
        phase, trouble = self.phase, self._inbox.trouble
        # A reply to EHLO has several lines.
        self.phase = phase if phase == "ehlo" else ""
        if trouble is None:
            await super().push(status)
        elif trouble.way is Way.PIECES:
            await self._push_pieces(status)
        elif phase == "data" and trouble.phase == "body":
            await super().push(status)
            await self._trouble(trouble, phase)
        elif phase and phase == trouble.phase:
            await self._trouble(trouble, phase)
        else:
            await super().push(status)

    async def _trouble(self, trouble: Trouble, phase: str) -> None:
        match trouble.way:
            case Way.HANG:
                # Until the connection is closed, by whichever side: that cancels us.
                await asyncio.Event().wait()
            case Way.CLOSE:
                self.cut()
            case Way.LONG:
                await super().push(b"250 2.0.0 " + b"x" * LONG_LINE)
            case _:
                if phase != "reply":
                    self._inbox.note_refusal(trouble, self.envelope)
                await super().push(trouble.text)
                if trouble.text.startswith("421"):
                    self.cut()

    async def _push_pieces(self, status: AnyStr) -> None:
        text = status.encode() if isinstance(status, str) else status
        for byte in text + b"\r\n":
            self._writer.write(bytes((byte,)))
            await asyncio.sleep(0)  # one piece a turn of the loop

    def cut(self) -> None:
        """Close the connection without a word, as a dying server does."""
        if isinstance(self.transport, asyncio.Transport):
            self.transport.abort()


def _welcome(*_: object) -> AuthResult:
    return AuthResult(success=True)


def main() -> int:
    """Run an inbox until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="deploy.local.inbox", description=__doc__)
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
