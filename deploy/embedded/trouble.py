"""The faults that an inbox can simulate: the behaviour of bad mail servers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from outbox_server.deploy.providers.profile import Profile
from outbox_server.shared.smtp.replies import Phase

# The phases of a session, by the server's reply in them. `body` is after the 354, while the body
# arrives; `reply` is the reply to the body.
PHASES: Final = ("greeting", "ehlo", "auth", "mail", "rcpt", "data", "body", "reply")
# A trouble in these phases affects new connections only.
OF_CONNECTIONS: Final = frozenset({"greeting", "ehlo", "auth"})
LONG_LINE: Final = 1_000_000


class Way(Enum):
    """The misbehaviour of the inbox in a phase."""

    # Does not reply, and keeps the connection open. After a body the mail is stored.
    HANG = auto()
    # Closes without a reply. After a body the mail is stored, so the sender is in doubt.
    CLOSE = auto()
    # Sends a text instead of its reply; a 421 closes. After a body the mail is not stored.
    REFUSE = auto()
    # Replies with a line of 1 MB.
    LONG = auto()
    # Sends every reply in pieces of one byte, in every phase.
    PIECES = auto()
    # Replies like a mail provider with a profile, in every phase.
    PROVIDER = auto()


@dataclass(frozen=True, slots=True)
class InboxTrouble:
    """One trouble. `text` is the reply of REFUSE, `profile` the provider that PROVIDER imitates."""

    way: Way
    phase: str = ""
    text: str = ""
    profile: Profile | None = None

    @property
    def for_good(self) -> bool:
        """Whether the mail is permanently refused."""
        return self.way is Way.REFUSE and self.text.startswith("552")

    @property
    def of_connections(self) -> bool:
        """Whether it affects new connections only."""
        connections = self.profile.connections if self.profile is not None else None
        return self.phase in OF_CONNECTIONS or (
            connections is not None and connections.refusal.phase is Phase.CONNECT
        )
