"""Mails over SMTP sessions, which shared/smtp_session.py opens.

Connections are kept per endpoint. Every phase has a limit, and the body is begun only while the
lease still holds: the last look at the clock is after the server's 354 and before the first byte.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import aiosmtplib
from aiosmtplib.errors import SMTPException, SMTPResponseException

from shared.egress import Egress
from shared.smtp_session import Endpoint, SmtpSession
from shared.states import AttemptOutcome

_ENHANCED = re.compile(r"([245]\.\d{1,3}\.\d{1,3})\b")
_LINE_DOT = re.compile(rb"(?m)^\.")
_SERVICE_CLOSING = 421
# Authentication required: the endpoint's settings are wrong, not the mail.
_AUTH_REQUIRED = 530
# RFC 5321, 4.2.1: what the first digit says holds for every code, known or not.
_COMPLETED = range(200, 300)
_START_INPUT = range(354, 355)
_TRANSIENT, _PERMANENT, _REPLIES_END = 400, 500, 600


@dataclass(frozen=True, slots=True)
class Envelope:
    """One mail with its SMTP addresses; `data` ends with CRLF, its dots are not doubled."""

    mail_from: str
    rcpt_to: str
    data: bytes
    needs_smtputf8: bool


@dataclass(frozen=True, slots=True)
class SendResult:
    """How an attempt ended. Times are of `time.monotonic`."""

    outcome: AttemptOutcome
    # The body was begun: the attempt takes a slot of the window.
    body_begun: bool
    started: float
    ended: float
    smtp_code: int | None = None
    enhanced_code: str | None = None
    message: str | None = None


class GivenBackError(Exception):
    """The send was not begun, since the dispatcher drains or the lease ran out."""


class _Session(SmtpSession):
    """A session that hands over mails, and when it last did."""

    idle_since = 0.0

    async def begin(self, envelope: Envelope) -> None:
        """Say MAIL, RCPT and DATA; returns when the server waits for the body."""
        options: tuple[bytes, ...] = ()
        if envelope.needs_smtputf8:
            if not self.client.supports_extension("smtputf8"):
                raise SMTPResponseException(
                    553, "5.6.7 the address needs SMTPUTF8, which the server does not offer"
                )
            options = (b"SMTPUTF8", b"BODY=8BITMIME")
        # Not client.mail and client.rcpt: they parse each address again, which costs as much as
        # the sending. The envelope's addresses are checked, and a control character is refused.
        sender, recipient = (f"<{a}>".encode() for a in (envelope.mail_from, envelope.rcpt_to))
        await self._say(_COMPLETED, b"MAIL", b"FROM:" + sender, *options)
        await self._say(_COMPLETED, b"RCPT", b"TO:" + recipient)
        await self._say(_START_INPUT, b"DATA")

    async def _say(self, expected: range, *command: bytes) -> None:
        reply = await self.client.execute_command(*command)
        if reply.code not in expected:
            raise SMTPResponseException(reply.code, reply.message)

    async def finish(self, data: bytes, limit: float) -> tuple[int, str]:
        """Send the body and return the server's reply."""
        if data.startswith(b".") or b"\n." in data:
            data = _LINE_DOT.sub(b"..", data)
        protocol = self.client.protocol
        if protocol is None:
            raise aiosmtplib.SMTPServerDisconnected("Connection lost")
        protocol.write(data + b".\r\n")
        reply = await protocol.read_response(timeout=limit)
        return reply.code, reply.message


class _EndpointPool:
    def __init__(self, size: int) -> None:
        self.places = asyncio.Semaphore(size)
        self.idle: deque[_Session] = deque()
        self.open_count = 0
        self.last_error = ""
        self.last_error_at: float | None = None


@dataclass(frozen=True, slots=True)
class EndpointState:
    """What GetDispatcherStatus tells of one endpoint; `last_error_at` is a Unix time."""

    host: str
    port: int
    circuit: str
    connection_count: int
    last_error: str
    last_error_at: float | None


class SmtpPool:
    """Kept-alive SMTP connections, capped per endpoint."""

    def __init__(
        self, *, size: int, timeout: float, idle: float, local_hostname: str, egress: Egress
    ) -> None:
        self._egress = egress
        self._size = size
        self._local_hostname = local_hostname
        self._timeout = timeout
        self._idle = idle
        self._pools: dict[Endpoint, _EndpointPool] = {}

    async def send(
        self,
        endpoint: Endpoint,
        envelope: Envelope,
        *,
        deadline: float,
        may_begin: Callable[[], bool],
    ) -> SendResult:
        """Hand one mail to its endpoint, until `deadline` (`time.monotonic`) at the latest.

        `may_begin` is asked before the first command and again right before the body.

        Raises:
            GivenBackError: `may_begin` said no; the server has seen no byte of the body.
        """
        pool = self._pools.setdefault(endpoint, _EndpointPool(self._size))
        async with pool.places:
            attempt = _Attempt(
                endpoint,
                lambda: self._session(pool, endpoint),
                lambda: self._forget(pool),
                lambda: may_begin() and time.monotonic() < deadline,
            )
            result = await attempt.run(envelope, deadline, self._timeout)
            if attempt.reusable is not None:
                attempt.reusable.idle_since = time.monotonic()
                pool.idle.append(attempt.reusable)
            if result.outcome is AttemptOutcome.CONNECTION_FAILURE:
                pool.last_error = result.message or ""
                pool.last_error_at = time.time()
            return result

    def _session(self, pool: _EndpointPool, endpoint: Endpoint) -> tuple[_Session, bool]:
        """Return a kept session that is still open, or a new one, and whether it was kept."""
        oldest = time.monotonic() - self._idle
        while pool.idle:
            session = pool.idle.pop()
            if session.client.is_connected and session.idle_since > oldest:
                return session, True
            session.close()
            pool.open_count -= 1
        pool.open_count += 1
        return _Session(endpoint, self._timeout, self._local_hostname, self._egress), False

    def _forget(self, pool: _EndpointPool) -> None:
        pool.open_count -= 1

    def close_idle(self) -> None:
        """Close the connections that nobody has used for the idle time."""
        oldest = time.monotonic() - self._idle
        for endpoint, pool in list(self._pools.items()):
            while pool.idle and pool.idle[0].idle_since <= oldest:
                pool.idle.popleft().close()
                pool.open_count -= 1
            if pool.open_count == 0 and not pool.last_error and not pool.places.locked():
                del self._pools[endpoint]

    def close(self) -> None:
        """Close every idle connection."""
        for pool in self._pools.values():
            while pool.idle:
                pool.idle.popleft().close()
                pool.open_count -= 1

    def states(self) -> list[EndpointState]:
        """Return what is known of each endpoint, by host and port."""
        return sorted(
            (
                EndpointState(
                    endpoint.host,
                    endpoint.port,
                    endpoint.circuit,
                    pool.open_count,
                    pool.last_error,
                    pool.last_error_at,
                )
                for endpoint, pool in self._pools.items()
            ),
            key=lambda state: (state.host, state.port),
        )


class _Attempt:
    """One hand-over: which phase it is in decides what a failure means."""

    def __init__(
        self,
        endpoint: Endpoint,
        session_of: Callable[[], tuple[_Session, bool]],
        forget: Callable[[], None],
        may_begin: Callable[[], bool],
    ) -> None:
        self._endpoint = endpoint
        self._session_of = session_of
        self._forget = forget
        self._may_begin = may_begin
        self._session: _Session | None = None
        self._ready = True
        self._started = 0.0
        self._deadline = 0.0
        self._body_begun = False
        self.reusable: _Session | None = None

    async def run(self, envelope: Envelope, deadline: float, limit: float) -> SendResult:
        self._check()
        self._started = time.monotonic()
        self._deadline = deadline
        try:
            session = await self._begin(envelope, min(3 * limit, deadline - self._started))
            # Nothing may follow 354 but a body: a no here costs the connection.
            self._check()
            self._body_begun = True
            left = min(limit, deadline - time.monotonic())
            code, text = await session.finish(envelope.data, max(left, 0.0))
        except SMTPResponseException as error:
            return await self._refused(error.code, error.message)
        except (SMTPException, OSError) as error:
            self._drop()
            return self._broken(error)
        except BaseException:
            self._drop()
            raise
        if code in _COMPLETED:
            self.reusable = session
            return self._result(AttemptOutcome.SENT, code, text)
        return await self._refused(code, text)

    def _check(self) -> None:
        if not self._may_begin():
            raise GivenBackError

    async def _begin(self, envelope: Envelope, limit: float) -> _Session:
        """Return a session that waits for the body.

        Each command has the session's limit; all of them together have this one.
        """
        async with asyncio.timeout(limit):
            while True:
                session, kept = self._session_of()
                self._session = session
                try:
                    if not kept:
                        self._ready = False
                        await session.open()
                        self._ready = True
                    await session.begin(envelope)
                except TimeoutError:
                    raise
                except OSError:
                    if not kept:
                        raise
                except SMTPResponseException as error:
                    if not kept or error.code != _SERVICE_CLOSING:
                        raise
                else:
                    return session
                # The server closed it while it was idle: that says nothing of server or mail.
                self._drop()

    async def _refused(self, code: int, text: str) -> SendResult:
        """The server said no; the session may be of use for the next mail."""
        session = self._session
        closing = code == _SERVICE_CLOSING or not _TRANSIENT <= code < _REPLIES_END
        if session is not None and not closing and session.client.is_connected:
            try:
                # An outcome that is known must not be lost with the lease.
                async with asyncio.timeout(self._deadline - time.monotonic()):
                    await session.client.rset()
                self.reusable = session
            except (SMTPException, OSError):
                self._drop()
        else:
            self._drop()
        if not _TRANSIENT <= code < _REPLIES_END:
            # No SMTP reply at all.
            outcome = (
                AttemptOutcome.IN_DOUBT if self._body_begun else AttemptOutcome.CONNECTION_FAILURE
            )
            return self._result(outcome, None, f"not an SMTP reply: {text}")
        if code in (_SERVICE_CLOSING, _AUTH_REQUIRED) or not self._ready:
            # Refused before the first mail (greeting, STARTTLS, AUTH), or no more mails.
            return self._result(AttemptOutcome.CONNECTION_FAILURE, code, text)
        if code < _PERMANENT:
            return self._result(AttemptOutcome.TEMPORARY_FAILURE, code, text)
        return self._result(AttemptOutcome.PERMANENT_FAILURE, code, text)

    def _broken(self, error: BaseException) -> SendResult:
        outcome = AttemptOutcome.IN_DOUBT if self._body_begun else AttemptOutcome.CONNECTION_FAILURE
        text = str(error) or type(error).__name__
        code = getattr(error, "code", None)
        return self._result(outcome, code if isinstance(code, int) else None, text)

    def _drop(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
            self._forget()

    def _result(self, outcome: AttemptOutcome, code: int | None, text: str) -> SendResult:
        enhanced = _ENHANCED.match(text) if code is not None else None
        return SendResult(
            outcome=outcome,
            body_begun=self._body_begun,
            started=self._started,
            ended=time.monotonic(),
            smtp_code=code,
            enhanced_code=enhanced.group(1) if enhanced else None,
            message=self._endpoint.shown(text),
        )
