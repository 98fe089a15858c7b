"""The development inbox's record: what the SMTP side saw, one JSON line a mail."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shared.audit import least_gap, most_in_window


@dataclass(frozen=True, slots=True)
class ReceivedMail:
    """One mail as the inbox received it. Times are seconds since 1970.

    `started_at` is at MAIL FROM, `received_at` when the body had ended and before the reply: both
    lie inside the time that the sending side counts as the send. So a gap or window seen here is
    never narrower than the sender's own.
    """

    started_at: float
    received_at: float
    mail_from: str
    rcpt_tos: tuple[str, ...]
    # As in the header, with its angle brackets; empty: the mail has none.
    message_id: str
    bytes: int
    # The mail's file name in the Maildir's `new`.
    file: str


class RecordFile:
    """Appends mails to a record: kill -9 loses none of them, the death of the machine may."""

    def __init__(self, path: Path) -> None:
        """Open the record to append; a line that a crash of the machine cut off is dropped."""
        self._file: BinaryIO = path.open("ab+", buffering=0)
        self._file.seek(0)
        kept = self._file.read().rfind(b"\n") + 1
        self._file.truncate(kept)

    def append(self, mail: ReceivedMail) -> None:
        """Write one line."""
        self._file.write(json.dumps(dataclasses.asdict(mail)).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_record(path: Path) -> list[ReceivedMail]:
    """Return the mails of a record in the order of their arrival; none if there is no file yet.

    May be called while the inbox writes: a last line without its end is left out.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    found = (json.loads(line) for line in lines)
    return [ReceivedMail(**mail | {"rcpt_tos": tuple(mail["rcpt_tos"])}) for mail in found]


def by_sender(mails: Iterable[ReceivedMail]) -> dict[str, list[ReceivedMail]]:
    """Return the mails of each MAIL FROM."""
    found = defaultdict(list)
    for mail in mails:
        found[mail.mail_from].append(mail)
    return dict(found)


def least_gap_s(mails: Iterable[ReceivedMail]) -> float | None:
    """Return the least gap of any sender, in seconds; None: no sender sent twice."""
    gaps = (
        least_gap((mail.started_at, mail.received_at) for mail in sent)
        for sent in by_sender(mails).values()
    )
    return min((gap for gap in gaps if gap is not None), default=None)


def most_in_any_window(mails: Iterable[ReceivedMail], window_s: float) -> dict[str, int]:
    """Return the most mails of each sender in any trailing window of so many seconds."""
    return {
        sender: most_in_window((mail.received_at for mail in sent), window_s)
        for sender, sent in by_sender(mails).items()
    }
