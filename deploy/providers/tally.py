"""Counts a provider's accepted mails, copies, refusals, and how connections ended."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, deque
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Final

from outbox_server.deploy.providers.limits import Bounded

# The maximum number of mails that are kept. The counts include older ones.
MOST_MAILS: Final = 100_000
# The maximum number of Message-IDs that are kept, to recognise copies.
MOST_MESSAGE_IDS: Final = 1_000_000
# The maximum number of different replies and EHLO names. All further ones are counted together.
_MOST_NAMES: Final = 200
_OTHERS: Final = "others"
_LONGEST_NAME: Final = 200


class Ending(StrEnum):
    """How a connection ended."""

    QUIT = "QUIT"
    CLIENT = "closed by the client without QUIT"
    SERVER = "closed by the server"
    IDLE = "closed by the server after idling"


@dataclass(frozen=True, slots=True)
class AcceptedMail:
    """One mail that was accepted. Times are seconds since 1970."""

    message_id: str
    mail_from: str
    recipients: tuple[str, ...]
    # The time of MAIL, and the time of the end of the body, before any delay of the reply.
    started_at: float
    received_at: float
    connection: int
    helo: str
    account: str
    bytes: int


class Tally:
    """Counts in bounded memory; with a file, one JSON line per mail and ended connection."""

    def __init__(self, file: Path | None = None) -> None:
        self.accepted = 0
        # Mails whose Message-ID had been accepted before.
        self.copies = 0
        self.connections = 0
        self.open_connections = 0
        self.most_open_connections = 0
        self.mails: deque[AcceptedMail] = deque(maxlen=MOST_MAILS)
        # The keys are first lines of replies.
        self.refusals: Counter[str] = Counter()
        # Mails that were permanently refused; for refusals at RCPT, recipients.
        self.refused_for_good = 0
        self.helo_names: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self._seen: Bounded[str, list[bool]] = Bounded(list, MOST_MESSAGE_IDS)
        self._file: BinaryIO | None = None if file is None else file.open("ab", buffering=0)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def opened(self) -> int:
        """Count a new connection, and return its number, from 1."""
        self.connections += 1
        self.open_connections += 1
        self.most_open_connections = max(self.most_open_connections, self.open_connections)
        return self.connections

    def greeted(self, helo: str) -> None:
        """Count the name of an EHLO."""
        _count(self.helo_names, helo)

    def accept(self, mail: AcceptedMail) -> None:
        """Count an accepted mail."""
        self.accepted += 1
        self.mails.append(mail)
        if mail.message_id:
            seen = self._seen.get(mail.message_id)
            self.copies += bool(seen)
            seen[:] = [True]
        self._write("accepted", dataclasses.asdict(mail))

    def refuse(self, reply: str, *, for_good: bool = False) -> None:
        """Count a refusal; fields that differ each time must not be in `reply`."""
        _count(self.refusals, reply)
        self.refused_for_good += for_good

    def closed(self, number: int, *, helo: str, account: str, mails: int, ending: Ending) -> None:
        """Count the end of a connection."""
        self.open_connections -= 1
        self.endings[ending] += 1
        self._write(
            "connection",
            {
                "connection": number,
                "helo": helo,
                "account": account,
                "mails": mails,
                "ending": ending,
            },
        )

    def summary(self) -> dict[str, Any]:
        """Return the numbers as one JSON document."""
        return {
            "accepted": self.accepted,
            "copies": self.copies,
            "refused_for_good": self.refused_for_good,
            "connections": self.connections,
            "open_connections": self.open_connections,
            "most_open_connections": self.most_open_connections,
            "endings": dict(self.endings),
            "helo_names": dict(self.helo_names),
            "refusals": dict(self.refusals),
        }

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"event": event, **fields}).encode() + b"\n")


def _count(counter: Counter[str], name: str) -> None:
    name = name[:_LONGEST_NAME]
    counter[name if name in counter or len(counter) < _MOST_NAMES else _OTHERS] += 1
