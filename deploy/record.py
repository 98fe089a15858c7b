"""The record of the development inbox: one JSON line for each mail that it received."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from outbox_server.deploy.private_files import open_private, write_private
from outbox_server.shared.audit.replay import least_gap, most_in_window

RECORD: Final = "record.jsonl"
# A file beside the record.
_RECEIVER_ID: Final = "receiver_id"
# Used to search headers only. The value of a folded header is on the next line.
MESSAGE_ID: Final = re.compile(rb"(?im)^message-id:\s*+(\S[^\r\n]*+)")


@dataclass(frozen=True, slots=True)
class ReceivedMail:
    """One mail as the inbox received it. Times are seconds since 1970.

    `started_at` is the time of MAIL FROM, `received_at` the time between the end of the body and
    the reply. Both lie within the send as the sender measures it. So a gap seen here is never
    shorter than the sender's own.
    """

    started_at: float
    received_at: float
    mail_from: str
    rcpt_tos: tuple[str, ...]
    # The value of the header, with angle brackets. Empty means that the mail has none.
    message_id: str
    bytes: int
    # The mail's file name in the Maildir's `new`.
    file: str


class RecordFile:
    """Appends mails to a record. A kill -9 loses none of them; a crash of the machine may."""

    def __init__(self, path: Path) -> None:
        """Open the record to append. A last line that a crash cut off is dropped."""
        self._file: BinaryIO = os.fdopen(
            open_private(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "ab+", buffering=0
        )
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
    """Return the mails of a record in the order of their arrival; none if the file is missing.

    It may be called while the inbox writes: an incomplete last line is left out.
    """
    try:
        return list(iterate_record(path))
    except FileNotFoundError:
        return []


def iterate_record(path: Path) -> Iterator[ReceivedMail]:
    """Yield the mails of a record of any length, in the order of their arrival.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a record.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return  # it is being written
            try:
                mail = json.loads(line)
                yield ReceivedMail(**mail | {"rcpt_tos": tuple(mail["rcpt_tos"])})
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}, line {number}: not the record of a mail") from None


def message_ids_in(maildir: Path) -> Iterator[str]:
    """Yield the Message-ID of every mail in `new` and `cur`, or "" for a mail without one.

    Raises:
        FileNotFoundError: the Maildir does not exist.
    """
    for folder in (maildir / "new", maildir / "cur"):
        for entry in os.scandir(folder):
            headers = bytearray()
            with Path(entry.path).open("rb") as file:
                for line in file:
                    if not line.strip():
                        break
                    headers += line
            found = MESSAGE_ID.search(headers)
            yield found[1].rstrip().decode("utf-8", "replace") if found else ""


def receiver_id_of(folder: Path) -> str | None:
    """Return the text in each reply of the server that stores its mails in `folder`, if known."""
    try:
        return (folder / _RECEIVER_ID).read_text().strip() or None
    except FileNotFoundError:
        return None


def ensure_receiver_id(folder: Path) -> str:
    """Return the receiver id of a folder, and store a new one if it has none."""
    known = receiver_id_of(folder)
    if known is not None:
        return known
    made = secrets.token_hex(6)
    write_private(folder / _RECEIVER_ID, f"{made}\n")
    return made


@dataclass(frozen=True, slots=True)
class KeptMails:
    """The mails that a server received, for an audit: a record with times, or a Maildir.

    The Maildir is not read if there is a record.
    """

    record: Path | None = None
    maildir: Path | None = None

    @property
    def receiver_id(self) -> str | None:
        """The text in each of the server's replies to a mail; None if it is unknown."""
        folder = self.maildir if self.record is None else self.record.parent
        return None if folder is None else receiver_id_of(folder)

    def message_ids(self) -> Iterator[str]:
        """Yield the Message-ID of every mail.

        Raises:
            FileNotFoundError: the file or folder does not exist.
            ValueError: the file is not a record.
        """
        if self.record is not None:
            yield from (mail.message_id for mail in iterate_record(self.record))
        elif self.maildir is not None:
            yield from message_ids_in(self.maildir)

    def sends(self) -> Iterator[tuple[str, float, float]] | None:
        """Return (Message-ID, start, end) of every mail; None for a Maildir, which has no times."""
        if self.record is None:
            return None
        mails = iterate_record(self.record)
        return ((mail.message_id, mail.started_at, mail.received_at) for mail in mails)


def by_sender(mails: Iterable[ReceivedMail]) -> dict[str, list[ReceivedMail]]:
    """Return the mails of each MAIL FROM."""
    found = defaultdict(list)
    for mail in mails:
        found[mail.mail_from].append(mail)
    return dict(found)


def least_gap_s(mails: Iterable[ReceivedMail]) -> float | None:
    """Return the shortest gap of any sender, in seconds; None if no sender sent twice."""
    gaps = (
        least_gap((mail.started_at, mail.received_at) for mail in sent)
        for sent in by_sender(mails).values()
    )
    return min((gap for gap in gaps if gap is not None), default=None)


def most_in_any_window(mails: Iterable[ReceivedMail], window_s: float) -> dict[str, int]:
    """Return the largest number of mails of each sender in any window of `window_s` seconds."""
    return {
        sender: most_in_window((mail.received_at for mail in sent), window_s)
        for sender, sent in by_sender(mails).items()
    }
