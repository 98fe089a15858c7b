"""Clients of a simulated provider: Python's smtplib, and a bare socket."""

from __future__ import annotations

import asyncio
import smtplib
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from email.message import EmailMessage
from typing import TypeVar

from outbox_server.deploy.certificates import Certificate
from outbox_server.deploy.providers.sasl import Account
from outbox_server.deploy.providers.server import Provider

T = TypeVar("T")

USER, PASSWORD, TOKEN = "anna", "secret", "token-1"
ACCOUNTS = {USER: Account(PASSWORD, {TOKEN})}
HELO = "client.x.test"


def client_context(certificate: Certificate) -> ssl.SSLContext:
    """Return a context that trusts a server's certificate."""
    return ssl.create_default_context(cafile=str(certificate.public))


def mail(number: int, subject: str = "Hello") -> EmailMessage:
    """Return a mail with the Message-ID `<number@x.test>`."""
    message = EmailMessage()
    message["Message-ID"] = f"<{number}@x.test>"
    message["From"], message["To"] = "a@x.test", "ann@y.test"
    message["Subject"] = subject
    message.set_content("Hello.\n.one dot\n..two dots\n.\nend\n")
    return message


class ForeignClient:
    """smtplib in a thread, so that its blocking calls do not stop the server's event loop."""

    def __init__(self, smtp: smtplib.SMTP) -> None:
        self.smtp = smtp

    async def do(self, call: Callable[[smtplib.SMTP], T]) -> T:
        return await asyncio.to_thread(call, self.smtp)

    async def send(
        self,
        number: int,
        recipient: str = "ann@y.test",
        *,
        subject: str = "Hello",
        mail_from: str = "a@x.test",
    ) -> str:
        """Send a mail; return 'accepted', or the refusal as `code text`."""
        message = mail(number, subject)
        try:
            await self.do(lambda smtp: smtp.send_message(message, mail_from, [recipient]))
        except smtplib.SMTPRecipientsRefused as error:
            [(code, text)] = error.recipients.values()
        except smtplib.SMTPResponseException as error:
            code, text = error.smtp_code, error.smtp_error  # type: ignore[assignment]
        except smtplib.SMTPServerDisconnected:
            return "disconnected"
        else:
            return "accepted"
        return f"{code} {text.decode() if isinstance(text, bytes) else text}"


@asynccontextmanager
async def foreign_client(
    provider: Provider,
    *,
    tls: ssl.SSLContext | None = None,
    login: tuple[str, str] | None = None,
    helo: str = HELO,
) -> AsyncIterator[ForeignClient]:
    """Connect, do STARTTLS and AUTH if requested, and QUIT at the end."""
    smtp = await asyncio.to_thread(
        smtplib.SMTP, "127.0.0.1", provider.port, local_hostname=helo, timeout=30
    )
    client = ForeignClient(smtp)
    try:
        await client.do(lambda one: one.ehlo())
        if tls is not None:
            await client.do(lambda one: one.starttls(context=tls))
            await client.do(lambda one: one.ehlo())
        if login is not None:
            await client.do(lambda one: one.login(*login))
        yield client
        if smtp.sock is not None:
            # The server may have closed the connection after a refusal.
            with suppress(smtplib.SMTPServerDisconnected):
                await client.do(lambda one: one.quit())
    finally:
        await client.do(lambda one: one.close())


class BareClient:
    """A socket that sends exactly the bytes of a test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def reply(self) -> str:
        """Return the next reply, with its lines joined by LF; empty if the server has closed."""
        lines = []
        while line := (await self.reader.readline()).decode():
            lines.append(line.rstrip("\r\n"))
            if line[3:4] != "-":
                break
        return "\n".join(lines)

    async def replies(self, number: int) -> list[str]:
        return [await self.reply() for _ in range(number)]

    def write(self, *lines: str) -> None:
        """Write lines in one piece."""
        self.writer.write("".join(f"{line}\r\n" for line in lines).encode())

    async def say(self, line: str) -> str:
        """Write a line; return the reply."""
        self.write(line)
        return await self.reply()


@asynccontextmanager
async def bare_client(
    provider: Provider, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[BareClient]:
    """Connect; with `tls`, TLS begins with the first byte."""
    reader, writer = await asyncio.open_connection("127.0.0.1", provider.port, ssl=tls)
    try:
        yield BareClient(reader, writer)
    finally:
        writer.transport.abort()
