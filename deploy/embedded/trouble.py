"""What an inbox can be told to do in place of taking a mail: what a bad relay does to its users."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from outbox_server.deploy.providers.profile import Profile
from outbox_server.shared.smtp.replies import Phase

# The phases of a session, by what the server has to say in them: `body` is after the 354, while
# the mail comes; `reply` is the answer to all of it.
PHASES: Final = ("greeting", "ehlo", "auth", "mail", "rcpt", "data", "body", "reply")
# A server that has them under way shows its trouble to new connections alone.
OF_CONNECTIONS: Final = frozenset({"greeting", "ehlo", "auth"})
LONG_LINE: Final = 1_000_000


class Way(Enum):
    """What is done in a phase."""

    # Says nothing, and keeps the connection. After a body the mail is stored.
    HANG = auto()
    # Closes without a word. After a body the mail is stored: nobody can know.
    CLOSE = auto()
    # Says a text in place of its reply; a 421 closes. After a body the mail is not stored.
    REFUSE = auto()
    # Its reply is a line of 1 MB.
    LONG = auto()
    # Every reply comes in pieces of one byte, whatever the phase.
    PIECES = auto()
    # Replies as a mail provider with a profile does, in every phase.
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
        """Whether the mail is refused so that nobody tries again."""
        return self.way is Way.REFUSE and self.text.startswith("552")

    @property
    def of_connections(self) -> bool:
        """Whether it concerns new connections only."""
        connections = self.profile.connections if self.profile is not None else None
        return self.phase in OF_CONNECTIONS or (
            connections is not None and connections.refusal.phase is Phase.CONNECT
        )
