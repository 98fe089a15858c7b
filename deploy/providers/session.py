"""One SMTP session with a simulated provider (RFC 5321, 2920, 3207, 4954)."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final

from outbox_server.deploy.providers.policy import Visit
from outbox_server.deploy.providers.sasl import (
    AuthCancelledError,
    BadResponseError,
    authenticate,
    decode,
)
from outbox_server.deploy.providers.speaker import Backend, SessionClosedError, Speaker
from outbox_server.deploy.providers.tally import Ending
from outbox_server.deploy.providers.transaction import MailTransaction
from outbox_server.deploy.providers.wire import ConnectionEndedError, LineTooLongError, Wire
from outbox_server.shared.smtp.replies import Phase

_MOST_FAILED_LOGINS: Final = 3
# RFC 5321, 4.5.3.1.2.
_LONGEST_NAME: Final = 255


class Session:
    """Serves one connection from greeting to close."""

    def __init__(self, backend: Backend, wire: Wire, visit: Visit) -> None:
        self._backend = backend
        self._wire = wire
        self._visit = visit
        self._speaker = Speaker(backend, wire, visit)
        self._mail = MailTransaction(self._speaker)
        self._failed_logins = 0
        self._commands: Mapping[str, Callable[[str], Awaitable[None]]] = {
            "EHLO": self._ehlo,
            "HELO": self._helo,
            "STARTTLS": self._starttls,
            "AUTH": self._auth,
            "MAIL": self._mail_from,
            "RCPT": self._mail.recipient,
            "DATA": self._mail.data,
            "RSET": self._rset,
            "NOOP": self._noop,
            "VRFY": self._vrfy,
            "QUIT": self._quit,
        }

    async def run(self) -> Ending:
        """Return how the connection ended."""
        profile = self._backend.profile
        try:
            await asyncio.sleep(profile.greeting_delay_s)
            self._speaker.check(Phase.CONNECT)
            self._speaker.say(220, profile.greeting.format(id=self._backend.policy.new_id()))
            while True:
                await self._next_command()
        except SessionClosedError as closed:
            return closed.ending
        except ConnectionEndedError:
            return Ending.CLIENT
        except TimeoutError:
            with suppress(SessionClosedError):
                self._speaker.refuse(profile.idle)
            return Ending.IDLE

    async def _next_command(self) -> None:
        try:
            line = await self._wire.read_line()
        except LineTooLongError:
            self._speaker.error(500, "5.5.2", "Error: line too long")
            return
        try:
            text = line.decode()
        except UnicodeDecodeError:
            self._speaker.error(500, "5.5.2", "Error: the command is not UTF-8")
            return
        verb, _, argument = text.partition(" ")
        command = self._commands.get(verb.upper())
        if command is None or not text.isprintable():
            self._speaker.error(500, "5.5.2", "Error: command not recognized")
            return
        await command(argument.strip())

    # Greeting, TLS, AUTH ---------------------------------------------------------------------

    async def _ehlo(self, argument: str) -> None:
        if not self._greeted(argument):
            return
        profile = self._backend.profile
        offered = [profile.host, *profile.extensions, f"SIZE {profile.size}"]
        if self._offers_tls:
            offered.append("STARTTLS")
        elif profile.mechanisms:
            offered.append(f"AUTH {' '.join(profile.mechanisms)}")
        self._mail.extended = True
        self._speaker.say(250, "\n".join(offered))

    async def _helo(self, argument: str) -> None:
        if self._greeted(argument):
            self._mail.extended = False
            self._speaker.say(250, self._backend.profile.host)

    def _greeted(self, helo: str) -> bool:
        if not 0 < len(helo) <= _LONGEST_NAME:
            self._speaker.error(501, "5.5.4", "Syntax: EHLO hostname")
            return False
        self._mail.reset()
        self._visit.helo = helo
        self._backend.tally.greeted(helo)
        return self._speaker.check(Phase.EHLO)

    @property
    def _offers_tls(self) -> bool:
        return self._backend.starttls is not None and not self._wire.secure

    def _lacks_tls(self) -> bool:
        profile = self._backend.profile
        if self._offers_tls and profile.requires_tls:
            self._speaker.refuse(profile.tls_required)
            return True
        return False

    async def _starttls(self, argument: str) -> None:
        context = self._backend.starttls
        if context is None or self._wire.secure:
            self._speaker.error(503, "5.5.1", "Error: STARTTLS is not available")
        elif argument:
            self._speaker.error(501, "5.5.4", "Syntax: STARTTLS")
        elif self._wire.has_input:
            # RFC 3207, 6: bytes that were sent without TLS must not be taken for encrypted ones.
            self._speaker.error(
                454, "4.5.0",
                "SMTP protocol violation, no commands allowed to pipeline after STARTTLS, "
                "see RFC 3207",
            )  # fmt: skip
            raise SessionClosedError(Ending.SERVER)
        elif self._speaker.check(Phase.STARTTLS):
            self._speaker.say(220, "Ready to start TLS", "2.0.0")
            await self._wire.start_tls(context)
            self._mail.reset()
            self._mail.extended = False
            self._visit.helo = ""

    async def _auth(self, argument: str) -> None:
        mechanism, _, initial = argument.partition(" ")
        if not self._mail.extended:
            self._speaker.error(503, "5.5.1", "Error: send EHLO first")
        elif self._lacks_tls():
            pass
        elif self._visit.account or self._mail.begun:
            self._speaker.error(503, "5.5.1", "Error: AUTH is not allowed now")
        elif mechanism.upper() not in self._backend.profile.mechanisms:
            self._speaker.error(504, "5.5.4", "Unrecognized authentication type")
        elif self._speaker.check(Phase.AUTH):
            await self._authenticate(mechanism.upper(), initial)

    async def _authenticate(self, mechanism: str, initial: str) -> None:
        try:
            first = decode(initial.encode()) if initial else None
            user = await authenticate(mechanism, first, self._ask, self._backend.accounts)
        except AuthCancelledError:
            self._speaker.error(501, "5.7.0", "Authentication cancelled")
            return
        except (BadResponseError, LineTooLongError):
            self._speaker.error(501, "5.5.2", "Cannot decode the response")
            return
        if user is not None:
            self._visit.account = user
            self._speaker.say(235, "Authentication successful", "2.7.0")
            return
        self._speaker.refuse(self._backend.profile.wrong_password)
        self._failed_logins += 1
        if self._failed_logins >= _MOST_FAILED_LOGINS:
            raise SessionClosedError(Ending.SERVER)

    async def _ask(self, challenge: bytes) -> bytes:
        self._wire.say(f"334 {base64.b64encode(challenge).decode()}")
        return decode(await self._wire.read_line())

    # Mail and the rest -----------------------------------------------------------------------

    async def _mail_from(self, argument: str) -> None:
        profile, visit = self._backend.profile, self._visit
        if not visit.helo:
            self._speaker.error(503, "5.5.1", "Error: send EHLO first")
        elif self._lacks_tls():
            pass
        elif profile.requires_auth and not visit.account:
            self._speaker.refuse(profile.auth_required)
        else:
            await self._mail.begin(argument)

    async def _rset(self, _: str) -> None:
        self._mail.reset()
        self._speaker.say(250, "Ok", "2.0.0")

    async def _noop(self, _: str) -> None:
        self._speaker.say(250, "Ok", "2.0.0")

    async def _vrfy(self, _: str) -> None:
        self._speaker.say(252, "Cannot verify the user, but will try to deliver", "2.5.2")

    async def _quit(self, _: str) -> None:
        self._speaker.say(221, "Bye", "2.0.0")
        raise SessionClosedError(Ending.QUIT)
