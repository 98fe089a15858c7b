"""Decides whether a provider refuses a step of a session, by its profile and its counts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from outbox_server.deploy.providers.limits import Bounded, FirstSeen, SlidingWindow
from outbox_server.deploy.providers.profile import (
    CONTENT_MARKER,
    FULL_PREFIX,
    UNKNOWN_PREFIX,
    Profile,
    Rate,
    RefusingReply,
    is_qualified,
)
from outbox_server.shared.smtp.replies import Phase

# A window holds one number per mail of its period.
MOST_ACCOUNTS: Final = 10_000
_LONGEST_VALUE: Final = 320


@dataclass(eq=False, slots=True)
class Visit:
    """The state of one connection for the limits of a provider."""

    number: int
    address: str
    # The account that signed in; empty before that.
    account: str = ""
    helo: str = ""
    mail_from: str = ""
    # Mails of this connection whose MAIL was accepted, and those that were accepted as a whole.
    begun: int = 0
    accepted: int = 0

    @property
    def payer(self) -> str:
        """The key that mails are counted by: the account, or the sender without a sign-in."""
        return self.account or self.mail_from


@dataclass(frozen=True, slots=True)
class GivenReply:
    """A refusing reply as it is sent on one connection."""

    refusing: RefusingReply
    # The text has the codes, and no line end at the end.
    reply: str


def _together(one: Visit, other: Visit) -> bool:
    """Return whether two connections count together: by account, and before AUTH by address."""
    if other.account:
        return one.account == other.account
    return one.address == other.address


def reply_of(code: int, text: str, enhanced: str = "") -> str:
    """Return a reply of one or more lines, each with its codes."""
    lines = text.split("\n")
    return "\r\n".join(
        f"{code}{' ' if number == len(lines) else '-'}{f'{enhanced} ' if enhanced else ''}{line}"
        for number, line in enumerate(lines, 1)
    )


class Policy:
    """Applies one profile to all connections of one server."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._visits: dict[int, Visit] = {}
        self._numbers = itertools.count(1)
        self._windows: Bounded[tuple[str, Rate], list[SlidingWindow]] = Bounded(list, MOST_ACCOUNTS)
        self._triplets: FirstSeen[tuple[str, str, str]] = FirstSeen()
        self._full: FirstSeen[str] = FirstSeen()

    def enter(self, visit: Visit) -> None:
        """Count a connection as open."""
        self._visits[visit.number] = visit

    def leave(self, visit: Visit) -> None:
        """Count a connection as closed."""
        self._visits.pop(visit.number, None)

    def new_id(self) -> str:
        """Return a text that is unique among the replies of this server."""
        return f"o{next(self._numbers):08x}"

    def refused(
        self, phase: Phase, visit: Visit, now: float, *, recipient: str = "", content: bytes = b""
    ) -> GivenReply | None:
        """Return the refusal of a step; None if the step is allowed.

        `now` is the time in seconds of one clock that never steps back.
        """
        for reply, most, used in self._refusals(phase, visit, now, recipient, content):
            return self.given(reply, visit, recipient, most=most, used=used)
        return None

    def given(
        self,
        reply: RefusingReply,
        visit: Visit,
        recipient: str = "",
        *,
        most: int = 0,
        used: int = 0,
    ) -> GivenReply:
        """Return a reply with its fields filled in."""
        values = {
            "id": self.new_id(),
            "recipient": recipient,
            "domain": recipient.rpartition("@")[2],
            "sender_domain": visit.mail_from.rpartition("@")[2],
            "helo": visit.helo,
        }
        shown = {name: value[:_LONGEST_VALUE] for name, value in values.items()}
        text = reply.text.format(most=most, used=used, **shown)
        return GivenReply(reply, reply_of(reply.code, text, reply.enhanced))

    def accept(self, visit: Visit, now: float) -> None:
        """Count a mail that was accepted."""
        visit.accepted += 1
        for rate in self.profile.rates:
            self._window(visit, rate).add(now)

    def _refusals(
        self, phase: Phase, visit: Visit, now: float, recipient: str, content: bytes
    ) -> Iterator[tuple[RefusingReply, int, int]]:
        """Yield each reason to refuse a step, with its limit and how much of it is used."""
        profile = self.profile
        yield from ((one, 0, 0) for one in profile.always if one.phase == phase)
        helo = profile.bad_helo
        if helo is not None and helo.phase == phase and not is_qualified(visit.helo):
            yield helo, 0, 0
        yield from self._of_connections(phase, visit)
        yield from self._of_rates(phase, visit, now)
        if phase is Phase.RCPT:
            yield from ((one, 0, 0) for one in self._of_recipient(recipient, now))
        yield from ((one, 0, 0) for one in self._of_greylist(phase, visit, recipient, now))
        if phase is profile.refused_content.phase and CONTENT_MARKER in content:
            yield profile.refused_content, 0, 0

    def _of_connections(
        self, phase: Phase, visit: Visit
    ) -> Iterator[tuple[RefusingReply, int, int]]:
        cap = self.profile.connections
        if cap is not None and cap.refusal.phase == phase:
            # The connections that were opened first keep working.
            before = sum(
                other.number < visit.number and _together(other, visit)
                for other in self._visits.values()
            )
            if before >= cap.most:
                yield cap.refusal, cap.most, before + 1
        cap = self.profile.mails_per_connection
        if cap is not None and cap.refusal.phase == phase:
            mails = visit.accepted if phase is Phase.BODY else visit.begun
            if mails >= cap.most:
                yield cap.refusal, cap.most, mails

    def _of_rates(
        self, phase: Phase, visit: Visit, now: float
    ) -> Iterator[tuple[RefusingReply, int, int]]:
        for rate in self.profile.rates:
            # Checked again at the final dot, because other mails may have used up the limit since.
            if phase in (rate.refusal.phase, Phase.BODY):
                window = self._window(visit, rate)
                if window.full(now):
                    yield rate.refusal, rate.most, window.used(now)

    def _of_recipient(self, recipient: str, now: float) -> Iterator[RefusingReply]:
        if recipient.lower().startswith(UNKNOWN_PREFIX):
            yield self.profile.unknown_recipient
        if recipient.lower().startswith(FULL_PREFIX):
            age = self._full.age(recipient.lower(), now)
            if age < self.profile.full_for_s:
                yield self.profile.full_mailbox

    def _of_greylist(
        self, phase: Phase, visit: Visit, recipient: str, now: float
    ) -> Iterator[RefusingReply]:
        greylist = self.profile.greylist
        if greylist is not None and greylist.refusal.phase == phase:
            triplet = (visit.address, visit.mail_from.lower(), recipient.lower())
            if self._triplets.age(triplet, now) < greylist.delay_s:
                yield greylist.refusal

    def _window(self, visit: Visit, rate: Rate) -> SlidingWindow:
        windows = self._windows.get((visit.payer.lower(), rate))
        if not windows:
            windows.append(SlidingWindow(rate.most, rate.seconds))
        return windows[0]
