"""What an inbox can be told to do in place of taking a mail: what a bad relay does to its users."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

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


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is wrong; `text` is what REFUSE says."""

    way: Way
    phase: str = ""
    text: str = ""

    @property
    def for_good(self) -> bool:
        """Whether the mail is refused so that nobody tries again."""
        return self.way is Way.REFUSE and self.text.startswith("552")
