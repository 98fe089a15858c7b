"""Opens SMTP sessions, by aiosmtplib: for dispatchers, and for VerifySender, which only asks.

Only this module and the dispatcher's smtp.py know the library.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import cast
from urllib.parse import unquote, urlsplit

import aiosmtplib

from shared.auth import is_loopback_host
from shared.egress import Egress
from shared.endpoints import RELAY
from shared.errors import ConfigurationError
from shared.states import SmtpSecurity

_SCHEMES = {
    "smtp": (SmtpSecurity.NONE, 25),
    "smtps": (SmtpSecurity.TLS, 465),
    "smtp+starttls": (SmtpSecurity.STARTTLS, 587),
}
_SERVICE_CLOSING = 421
_SHOWN = 500
_LEAST_SECRET = 4


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how a sender's mail is handed over."""

    host: str
    port: int
    security: SmtpSecurity
    username: str = ""
    password: str = field(default="", repr=False)
    # The operator's own relay: it may be anywhere. Every other is a user's, and checked. Part of
    # the identity: a user who names the relay gets no connection that was opened for it.
    operators: bool = False
    # Its name in Redis (`shared.endpoints`).
    circuit: str = field(default=RELAY, compare=False)

    def shown(self, text: str) -> str:
        """Return what people may read of a server's answer, and PostgreSQL takes of any bytes.

        Some servers quote the command that they do not like, and AUTH has the password.
        """
        for secret in self._secrets():
            text = text.replace(secret, "[password]")
        return text[:_SHOWN].replace("\x00", "").encode("utf-8", "replace").decode()

    def _secrets(self) -> tuple[str, ...]:
        """Return the password as AUTH PLAIN and LOGIN say it, and in clear."""
        if not self.password:
            return ()
        plain, login = (
            b64encode(said.encode()).decode()
            for said in (f"\0{self.username}\0{self.password}", self.password)
        )
        # A shorter one hides nothing, and may stand in any answer.
        clear = (self.password,) * (len(self.password) >= _LEAST_SECRET)
        return (plain, login, *clear)


def relay_of(url: str, *, plaintext: bool = False) -> Endpoint:
    """Return the endpoint that OUTBOX_SMTP_URL names.

    Raises:
        ConfigurationError: the URL is none of smtp://, smtps://, smtp+starttls://, or its password
            would cross a network in clear, and `plaintext` (OUTBOX_PLAINTEXT) is not set.
    """
    try:
        parts = urlsplit(url)
        security, port = _SCHEMES[parts.scheme]
        host, given_port = parts.hostname, parts.port
    except (KeyError, ValueError):
        host, given_port, security, port = None, None, SmtpSecurity.NONE, 0
    if not host:
        # Without what was given: it may hold a password.
        raise ConfigurationError(
            "OUTBOX_SMTP_URL: it takes smtp://host:port, smtps://host:port or "
            "smtp+starttls://host:port, with user:password@ before the host where needed"
        )
    if (
        parts.password
        and security is SmtpSecurity.NONE
        and not (plaintext or is_loopback_host(host))
    ):
        raise ConfigurationError(
            f"OUTBOX_SMTP_URL: its password would be sent to {host} in clear; take "
            "smtp+starttls:// or smtps://, or set OUTBOX_PLAINTEXT=true"
        )
    return Endpoint(
        host=host,
        port=given_port or port,
        security=security,
        username=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        operators=True,
    )


class SmtpSession:
    """One connection to an endpoint."""

    def __init__(
        self, endpoint: Endpoint, timeout: float, local_hostname: str, egress: Egress
    ) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._egress = egress
        # Greeted, and where it is asked for encrypted and authenticated.
        self.ready = False
        self.client = aiosmtplib.SMTP(
            hostname=endpoint.host,
            port=endpoint.port,
            username=endpoint.username or None,
            password=endpoint.password or None,
            use_tls=endpoint.security is SmtpSecurity.TLS,
            start_tls=endpoint.security is SmtpSecurity.STARTTLS,
            timeout=timeout,
            local_hostname=local_hostname,
        )

    async def open(self) -> None:
        """Connect, encrypt, greet, sign in, as the endpoint asks for; each step has its limit."""
        if self._endpoint.operators:
            await self.client.connect()
        else:
            await self._connect_checked()
        if self.client.is_ehlo_or_helo_needed:
            try:
                await self.client.ehlo()
            except aiosmtplib.SMTPHeloError as error:
                if error.code == _SERVICE_CLOSING:
                    raise
                await self.client.helo()
        self.ready = True

    async def _connect_checked(self) -> None:
        endpoint = self._endpoint
        if endpoint.password and endpoint.security is SmtpSecurity.NONE:
            raise OSError("the password is sent over TLS only: take STARTTLS or TLS")
        try:
            async with asyncio.timeout(self._timeout):
                opened = await self._egress.connect(endpoint.host, endpoint.port)
        except TimeoutError:
            raise TimeoutError(
                f"Timed out connecting to {endpoint.host} on port {endpoint.port}"
            ) from None
        try:
            # The host's name still is what its certificate must have. From here on the socket is
            # its transport's: closed under a TLS session that is still saying good-bye, its number
            # would be the next connection's while the loop still watches it for this one.
            await self.client.connect(sock=opened, port=None)
        except aiosmtplib.SMTPConnectError as error:
            if type(error) is not aiosmtplib.SMTPConnectError:
                raise
            said = error.message.replace("port None", f"port {endpoint.port}")
            raise aiosmtplib.SMTPConnectError(said) from error.__cause__

    def close(self) -> None:
        """End it at once."""
        # Not client.close() alone: it goes on sending what is not sent yet, a body that was given
        # up, to whoever is slow enough to take it hours later.
        if self.client.transport is not None:
            # No isinstance: uvloop's transports are none of asyncio's.
            cast(asyncio.WriteTransport, self.client.transport).abort()
        self.client.close()


@dataclass(frozen=True, slots=True)
class Probe:
    """How far a session came in which no mail was handed in; `failure` empty: all the way."""

    elapsed: timedelta
    tls_version: str = ""
    extensions: tuple[str, ...] = ()
    smtp_code: int | None = None
    failure: str = ""


async def probe(
    endpoint: Endpoint,
    *,
    step_limit: timedelta,
    limit: timedelta,
    local_hostname: str,
    egress: Egress,
) -> Probe:
    """Open a session, ask for nothing (NOOP), and end it.

    `step_limit` is for each step, `limit` for all together.
    """
    session = SmtpSession(endpoint, step_limit.total_seconds(), local_hostname, egress)
    started = time.monotonic()
    code: int | None = None
    failure = ""
    try:
        async with asyncio.timeout(limit.total_seconds()):
            await session.open()
            await session.client.noop()
            tls, extensions = _found(session)
            with suppress(aiosmtplib.SMTPException, OSError):
                # How it says good-bye is nobody's concern.
                await session.client.quit()
    except (aiosmtplib.SMTPException, OSError) as error:
        tls, extensions = _found(session)
        text = str(error) or type(error).__name__
        if isinstance(error, aiosmtplib.SMTPResponseException):
            text = f"{error.code} {error.message}"
        # aiosmtplib's own, of what is no reply at all, is -1.
        code = getattr(error, "code", -1)
        failure = f"{_step(session, error)}: {text}"
    finally:
        session.close()
    return Probe(
        timedelta(seconds=time.monotonic() - started),
        tls_version=tls,
        extensions=extensions,
        smtp_code=code if isinstance(code, int) and code > 0 else None,
        failure=endpoint.shown(failure),
    )


def _found(session: SmtpSession) -> tuple[str, tuple[str, ...]]:
    client = session.client
    transport = client.transport
    encrypted = transport.get_extra_info("ssl_object") if transport is not None else None
    version = encrypted.version() if encrypted is not None else None
    return version or "", tuple(sorted(name.upper() for name in client.esmtp_extensions))


def _step(session: SmtpSession, error: BaseException) -> str:
    """Return what was being done when it failed."""
    if session.ready:
        return "asking for nothing (NOOP)"
    if isinstance(error, aiosmtplib.SMTPAuthenticationError):
        return "signing in (AUTH)"
    if isinstance(error, aiosmtplib.SMTPHeloError):
        return "greeting (EHLO)"
    if isinstance(error.__cause__ or error, ssl.SSLError) or "STARTTLS" in str(error):
        return "encrypting (TLS)"
    return "connecting"
