"""Opens SMTP sessions: connect, TLS, EHLO, AUTH. EHLO, STARTTLS and AUTH use aiosmtplib.

Dispatchers send mail over these sessions; VerifySender stops before the body. Only this module and
`oauth2_auth.py` use the library.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, cast

import aiosmtplib
from aiosmtplib.protocol import SMTPProtocol
from aiosmtplib.response import SMTPResponse

from outbox_server.shared.egress import Egress, reason_of
from outbox_server.shared.oauth2.credentials import (
    NO_TOKENS,
    WAIT_LIMIT_S,
    OAuth2Ref,
    TokenProvider,
    TokenUnavailable,
)
from outbox_server.shared.smtp.commands import Answer, Command, check_command, reply_within
from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.smtp.exchange import Exchange
from outbox_server.shared.smtp.helo import address_literal
from outbox_server.shared.smtp.limits import Deadline, FixedDeadline, PhaseLimits
from outbox_server.shared.smtp.oauth2_auth import Login, authenticate, is_token_refused, login_for
from outbox_server.shared.smtp.replies import Phase, lacks_auth_method, leaves_session_usable
from outbox_server.shared.smtp.reply_parser import MalformedReply, WireReply
from outbox_server.shared.smtp.stream import ConnectionLost, SmtpStream
from outbox_server.shared.states import SmtpSecurity
from outbox_server.shared.tls import TlsContexts

# Limit, in seconds, of the reply to QUIT and of the close after it.
QUIT_LIMIT: Final = 2.0
# TCP keep-alive: seconds before the first probe, seconds between probes, and how many probes may go
# unanswered.
_KEEP_ALIVE: Final = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
# Errors that end a session and are not a refusal by the server.
SESSION_ERRORS: Final = (OSError, MalformedReply)


class SessionRefused(Exception):
    """The server refused a step before MAIL."""

    def __init__(self, phase: Phase, reply: WireReply) -> None:
        super().__init__(str(reply))
        self.phase = phase
        self.reply = reply


class SmtpSession:
    """One connection to an endpoint.

    `phase` is the step that was begun last. `helo` is the name sent in EHLO; if it is empty, it
    becomes the address of the connection's own end, as an address literal.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        limits: PhaseLimits,
        helo: str,
        egress: Egress,
        tls: TlsContexts,
        tokens: TokenProvider = NO_TOKENS,
    ) -> None:
        self._endpoint = endpoint
        self._limits = limits
        self._egress = egress
        self._tls = tls
        self._tokens = tokens
        # The login that the session used last. None without OAuth 2.0.
        self._login: Login | None = None
        self.helo = helo
        self.phase = Phase.CONNECT
        self.stream = SmtpStream()
        # The extensions in the last reply to EHLO: lower-case name, and parameters.
        self.extensions: dict[str, str] = {}

    @property
    def tls_version(self) -> str:
        """The version of TLS in use, such as `TLSv1.3`. Empty without TLS."""
        with suppress(ConnectionLost):
            encrypted = self.stream.transport.get_extra_info("ssl_object")
            if encrypted is not None:
                return encrypted.version() or ""
        return ""

    def shown(self, text: str) -> str:
        """Return a reply as people may read it: shortened, and without password and token."""
        return self._endpoint.shown(text if self._login is None else self._login.hide(text))

    async def open(self, deadline: Deadline) -> None:
        """Connect, start TLS, say EHLO and sign in, as the endpoint requires, before `deadline`.

        Raises:
            SessionRefused: the server refused a step.
            TokenRefused: the OAuth 2.0 provider refuses an access token.
            OSError: connecting, TLS, requesting an access token or signing in failed. This includes
                TimeoutError and TokenUnavailable.
            MalformedReply: the server does not speak SMTP.
        """
        endpoint = self._endpoint
        if endpoint.password and endpoint.security is SmtpSecurity.NONE and not endpoint.operators:
            raise OSError("the password is sent over TLS only: use STARTTLS or TLS")
        if endpoint.oauth2 and endpoint.security is SmtpSecurity.NONE:
            raise OSError("the access token is sent over TLS only: use STARTTLS or TLS")
        try:
            if endpoint.oauth2 is None:
                await self._open(deadline)
            else:
                await self._open_by_token(endpoint.oauth2, deadline)
        except aiosmtplib.SMTPResponseException as error:
            raise self._refused(WireReply(error.code, error.message)) from None
        except aiosmtplib.SMTPException as error:
            raise OSError(str(error)) from None

    async def _open_by_token(self, ref: OAuth2Ref, deadline: Deadline) -> None:
        # Before the connection, so that no mail server waits for the OAuth 2.0 provider.
        self._login = await self._request_login(ref, deadline)
        try:
            await self._open(deadline)
        except aiosmtplib.SMTPAuthenticationError as error:
            if not is_token_refused(error):
                raise
            # The token may have been revoked. Another token is tried once, on a new connection,
            # because some servers refuse a second AUTH.
            await self.quit()
            self._login = await self._request_login(ref, deadline, refused=self._login)
            self.stream = SmtpStream()
            await self._open(deadline)

    async def _request_login(
        self, ref: OAuth2Ref, deadline: Deadline, refused: Login | None = None
    ) -> Login:
        self.phase = Phase.AUTH
        try:
            async with deadline.limit(WAIT_LIMIT_S):
                return await login_for(self._tokens, ref, self._endpoint.username, refused)
        except TimeoutError:
            raise TokenUnavailable("OAuth 2.0: no access token in time") from None

    async def _open(self, deadline: Deadline) -> None:
        endpoint = self._endpoint
        await self._connect(deadline)
        if endpoint.security is SmtpSecurity.TLS:
            await self._encrypt(deadline)
        await self._greet(deadline)
        client = self._client(deadline)
        await self._ehlo(client)
        if endpoint.security is SmtpSecurity.STARTTLS:
            await self._start_tls(client, deadline)
            # RFC 3207, section 4.2: what the server said before TLS is discarded.
            client = self._client(deadline)
            await self._ehlo(client)
        if endpoint.username or endpoint.oauth2:
            await self._sign_in(client)

    async def _connect(self, deadline: Deadline) -> None:
        self.phase = Phase.CONNECT
        host, port = self._endpoint.host, self._endpoint.port
        loop = asyncio.get_running_loop()
        try:
            async with deadline.limit(self._limits.connect):
                if self._endpoint.operators:
                    await _connect_anywhere(host, port, self.stream)
                else:
                    opened = await self._egress.connect(host, port, user=self._endpoint.chosen_by)
                    # From here on the transport owns the socket.
                    await loop.create_connection(lambda: self.stream, sock=opened)
        except TimeoutError:
            where = "the operator's relay" if self._endpoint.operators else f"{host}, port {port},"
            raise TimeoutError(f"no connection to {where} in time") from None
        _keep_alive(self.stream.transport)

    async def _encrypt(self, deadline: Deadline) -> None:
        self.phase = Phase.STARTTLS
        host = self._endpoint.host
        context = await self._context()
        try:
            async with deadline.limit(self._limits.connect):
                await self.stream.encrypt(context, host, self._limits.connect)
        except ssl.SSLCertVerificationError as error:
            raise OSError(
                f"the certificate of {host} is not trusted: {error.verify_message}"
            ) from None
        except TimeoutError:
            raise TimeoutError(f"no TLS with {host} in time") from None
        except (ssl.SSLError, ConnectionError) as error:
            raise OSError(f"no TLS with {host}: {reason_of(error)}") from None

    async def _context(self) -> ssl.SSLContext:
        try:
            return await self._tls.context_for(self._endpoint.ca)
        except ssl.SSLError:
            raise OSError("the endpoint's CA certificates cannot be used") from None

    async def _greet(self, deadline: Deadline) -> None:
        self.phase = Phase.CONNECT
        reply = await reply_within(self.stream, self._limits.greeting, deadline, "the connection")
        if not reply.accepts:
            raise self._refused(reply)

    def _refused(self, reply: WireReply) -> Exception:
        """Return the error for a reply after which the session cannot be opened."""
        if reply.refuses:
            return SessionRefused(self.phase, reply)
        return MalformedReply(f"not a reply to {self.phase}: code {reply.code}")

    def _client(self, deadline: Deadline) -> aiosmtplib.SMTP:
        sockname = self.stream.transport.get_extra_info("sockname")
        self.helo = self.helo or address_literal(sockname)
        client = _Client(hostname=self._endpoint.host, local_hostname=self.helo, timeout=None)
        protocol = _LibraryProtocol(self, self._limits.ehlo, deadline)
        client.protocol = cast(SMTPProtocol, protocol)
        client.transport = self.stream.transport
        return client

    async def _ehlo(self, client: aiosmtplib.SMTP) -> None:
        self.phase = Phase.EHLO
        try:
            await client.ehlo()
        except aiosmtplib.SMTPHeloError as error:
            reply = WireReply(error.code, error.message)
            if not (reply.refuses and leaves_session_usable(reply.code)):
                raise
            await client.helo()
        self.extensions = dict(client.esmtp_extensions)

    async def _start_tls(self, client: aiosmtplib.SMTP, deadline: Deadline) -> None:
        self.phase = Phase.STARTTLS
        if "starttls" not in self.extensions:
            raise OSError("the server does not offer STARTTLS")
        reply = await client.execute_command(b"STARTTLS")
        if not WireReply(reply.code, reply.message).accepts:
            raise aiosmtplib.SMTPResponseException(reply.code, reply.message)
        await self._encrypt(deadline)

    async def _sign_in(self, client: aiosmtplib.SMTP) -> None:
        self.phase = Phase.AUTH
        if self._login is not None:
            await authenticate(client, self._login)
            return
        if not client.supported_auth_methods:
            offered = self.extensions.get("auth") or "none"
            raise OSError(
                f"the server offers no AUTH mechanism that Outbox supports (AUTH: {offered[:100]})"
            )
        await self._log_in(client)

    async def _log_in(self, client: aiosmtplib.SMTP) -> None:
        """Try the password once, by the first method that the server really supports.

        The library's own `login` tries every method after any refusal: three wrong passwords at a
        time, which lock an account.
        """
        *others, last = client.supported_auth_methods
        for method in (*others, last):
            log_in = getattr(client, f"auth_{method.replace('-', '')}")
            try:
                await log_in(self._endpoint.username, self._endpoint.password)
            except aiosmtplib.SMTPAuthenticationError as error:
                if method == last or not lacks_auth_method(error.code):
                    raise
            else:
                return

    def exchange_of(self, commands: Sequence[Command]) -> Exchange:
        """Return the exchange of these commands, which is not begun."""
        return Exchange(self.stream, commands, pipelining="pipelining" in self.extensions)

    async def exchange(self, commands: Sequence[Command], deadline: Deadline) -> list[Answer]:
        """Send commands and return their replies, in order (see `Exchange`).

        After a refusal, the replies to the commands behind it may be missing.

        Raises:
            TimeoutError: a reply took longer than its limit, or the deadline has passed.
            ConnectionLost: the connection ended.
            MalformedReply: the server does not speak SMTP, or a reply fits no command.
        """
        exchange, over = self.exchange_of(commands), False
        self.phase = commands[0].phase
        exchange.begin()
        try:
            while not over:
                self.phase = exchange.due.phase
                reply = await reply_within(self.stream, exchange.limit, deadline, self.phase)
                over = exchange.take(reply)
        except SESSION_ERRORS:
            if exchange.refusal is None:
                raise
        return exchange.answers

    async def quit(self, deadline: Deadline | None = None) -> None:
        """Send QUIT, wait for the reply for at most QUIT_LIMIT or until `deadline`, and close."""
        deadline = deadline or FixedDeadline(QUIT_LIMIT)
        try:
            self.stream.write(b"QUIT\r\n")
            await self.stream.reply(QUIT_LIMIT, deadline)
            self.stream.transport.close()
            await self.stream.until_closed(QUIT_LIMIT, deadline)
        except SESSION_ERRORS:
            pass  # the session is over, whatever the server did with QUIT
        finally:
            self.stream.abort()

    def abort(self) -> None:
        """Close the connection at once, without QUIT."""
        self.stream.abort()


def _keep_alive(transport: asyncio.Transport) -> None:
    """Have the kernel probe a silent connection.

    A reply may take ten minutes. Many firewalls and NATs drop a connection that is silent for five
    minutes; the reply to an accepted mail would then be lost.
    """
    connection = transport.get_extra_info("socket")
    if connection is None:
        return  # the connection has ended, and what the server has sent before decides
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


async def _connect_anywhere(host: str, port: int, stream: SmtpStream) -> None:
    """Connect to an endpoint of the operator, which may be in the operator's network."""
    try:
        await asyncio.get_running_loop().create_connection(lambda: stream, host, port)
    except (OSError, UnicodeError) as error:  # not every name can be encoded
        # Users read this text, so it names no host and no address of the operator's network.
        raise OSError(f"no connection to the operator's relay: {reason_of(error)}") from None


class _Client(aiosmtplib.SMTP):
    """The library's commands, on a connection that the session opens and closes."""

    def close(self) -> None:
        """Do nothing. The library would close after a 421; the session sends QUIT first."""


class _LibraryProtocol:
    """Takes the place of the library's protocol, and uses the session's stream.

    So one bounded reader reads every reply, from the greeting on.
    """

    def __init__(self, session: SmtpSession, limit: float, deadline: Deadline) -> None:
        self._session = session
        self._limit = limit
        self._deadline = deadline

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection."""
        return self._session.stream.connected

    async def execute_command(
        self,
        *parts: bytes,
        timeout: float | None = None,  # noqa: ARG002, ASYNC109 - the library's signature
    ) -> SMTPResponse:
        """Send a command and return the reply."""
        stream = self._session.stream
        stream.write(check_command(b" ".join(parts)) + b"\r\n")
        reply = await reply_within(stream, self._limit, self._deadline, self._session.phase)
        return SMTPResponse(reply.code, reply.text)
