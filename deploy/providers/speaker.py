"""Sends a provider's replies on one connection, asks its policy, and counts its refusals."""

from __future__ import annotations

import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from outbox_server.deploy.mail_store import MailStore
from outbox_server.deploy.providers.policy import GivenReply, Policy, Visit, reply_of
from outbox_server.deploy.providers.profile import Profile, RefusingReply
from outbox_server.deploy.providers.sasl import Account
from outbox_server.deploy.providers.tally import Ending, Tally
from outbox_server.deploy.providers.wire import Wire
from outbox_server.shared.smtp.replies import Phase

_MOST_ERRORS: Final = 20


class SessionClosedError(Exception):
    """The server has sent its last reply, and closes the connection."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending)
        self.ending = ending


@dataclass(frozen=True)
class Backend:
    """What all sessions of a server share."""

    profile: Profile
    policy: Policy
    tally: Tally
    # None means that any name and any secret are accepted.
    accounts: Mapping[str, Account] | None
    # The context of STARTTLS. None means that TLS is neither offered nor required.
    starttls: ssl.SSLContext | None
    store: MailStore | None


class Speaker:
    """Sends the server's replies on one connection."""

    def __init__(self, backend: Backend, wire: Wire, visit: Visit) -> None:
        self.backend = backend
        self.profile = backend.profile
        self.wire = wire
        self.visit = visit
        self._errors = 0

    def say(self, code: int, text: str, enhanced: str = "") -> None:
        """Send a reply. `text` must have no fields that are still to be filled in."""
        self.wire.say(reply_of(code, text, self._enhanced(enhanced)))

    def check(self, phase: Phase, *, recipient: str = "", content: bytes = b"") -> bool:
        """Ask the policy about a step, and send its refusal if there is one.

        Returns whether the step is allowed.

        Raises:
            SessionClosedError: the provider closes the connection after the refusal.
        """
        given = self.backend.policy.refused(
            phase, self.visit, time.monotonic(), recipient=recipient, content=content
        )
        if given is not None:
            self._give(given)
        return given is None

    def refuse(self, reply: RefusingReply) -> None:
        """Send a refusing reply of the profile.

        Raises:
            SessionClosedError: the provider closes the connection after it.
        """
        self._give(self.backend.policy.given(reply, self.visit))

    def error(self, code: int, enhanced: str, text: str) -> None:
        """Refuse a command that every server refuses, such as a wrong syntax.

        Raises:
            SessionClosedError: the client made too many errors.
        """
        self.say(code, text, enhanced)
        self.backend.tally.refuse(reply_of(code, text, self._enhanced(enhanced)))
        self._errors += 1
        if self._errors >= _MOST_ERRORS:
            self.say(421, "Error: too many errors", "4.7.0")
            raise SessionClosedError(Ending.SERVER)

    def _give(self, given: GivenReply) -> None:
        self.wire.say(given.reply)
        reply = given.refusing
        self.backend.tally.refuse(
            reply_of(reply.code, reply.text.partition("\n")[0], reply.enhanced),
            for_good=reply.for_good,
        )
        if reply.closes:
            raise SessionClosedError(Ending.SERVER)

    def _enhanced(self, code: str) -> str:
        # RFC 2034: only a server that offers them uses them.
        return code if "ENHANCEDSTATUSCODES" in self.profile.extensions else ""
