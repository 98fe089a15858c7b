"""Replies of real servers and their meanings: the tables in `replies/`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from outbox_server.shared.smtp.replies import Phase, Reply, split_enhanced_code
from outbox_server.shared.states import ReplyClass


@dataclass(frozen=True)
class RealReply:
    """One reply on the wire, and its phase."""

    server: str
    phase: Phase
    said: str
    expected: ReplyClass
    daily: bool = False
    earlier_mails: int = 0

    def reply(self) -> Reply:
        code = int(self.said[:3])
        enhanced, text = split_enhanced_code(code, self.said)
        return Reply(self.phase, code, enhanced, text, self.earlier_mails)


def _rows(file: str) -> list[RealReply]:
    """Return the rows of a table. Its first lines explain the format."""
    text = Path(__file__).with_name("replies").joinpath(file).read_text(encoding="utf-8")
    rows = []
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        server, phase, meaning, said = (part.strip() for part in line.split("|", 3))
        name, _, daily = meaning.partition(" ")
        rows.append(
            RealReply(
                server,
                Phase[phase.rstrip("+")],
                said.replace("\\n", "\n"),
                ReplyClass[name],
                daily=daily == "daily",
                earlier_mails=3 if phase.endswith("+") else 0,
            )
        )
    return rows


OF_THE_TABLE = _rows("of_the_table.txt")
OF_REAL_SERVERS = _rows("of_real_servers.txt")
