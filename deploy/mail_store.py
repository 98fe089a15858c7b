"""A Maildir of received mails, with a record of when each arrived."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Final

from outbox_server.deploy.private_files import open_private, private_folder
from outbox_server.deploy.record import (
    MESSAGE_ID,
    RECORD,
    ReceivedMail,
    RecordFile,
    ensure_receiver_id,
)

HOSTNAME: Final = "inbox.localhost"
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_END_OF_HEADERS: Final = b"\r\n\r\n"


class MailStore:
    """Stores mails exactly as they arrived.

    The standard library's `mailbox.Maildir` and mail programs can open the Maildir (`tmp`, `new`,
    `cur`). It also contains `record.jsonl`, the record of arrivals. Only the owner may read them.
    Nothing is synced to disk.
    """

    def __init__(self, maildir: Path) -> None:
        self.maildir = maildir
        # In each reply to a stored mail, so that an audit knows which mails came here. Known once
        # the store is open, and the same whenever it is opened again.
        self.receiver_id = ""
        self._record: RecordFile | None = None
        # File names are unique as in maildir(5): time, process, number within the process.
        self._serial = itertools.count(1)

    @property
    def record(self) -> Path:
        """The record's file, for `read_record`."""
        return self.maildir / RECORD

    def open(self) -> None:
        """Make the folders, which only their owner may enter, and open the record to append.

        Raises:
            ForeignFolderError: a folder belongs to another user.
        """
        private_folder(self.maildir)
        for name in ("tmp", "new", "cur"):
            private_folder(self.maildir / name)
        self.receiver_id = ensure_receiver_id(self.maildir)
        self._record = RecordFile(self.record)

    def close(self) -> None:
        """Close the record."""
        if self._record is not None:
            self._record.close()
            self._record = None

    def add(
        self, content: bytes, *, started_at: float, mail_from: str, rcpt_tos: tuple[str, ...]
    ) -> ReceivedMail:
        """Store one mail that has just arrived. `started_at` is the time of MAIL (Unix seconds).

        Raises:
            RuntimeError: the store is not open.
        """
        if self._record is None:
            raise RuntimeError("the mail store is not open")
        received_at = time.time()
        file = f"{received_at:.6f}".replace(".", ".M") + f"P{os.getpid()}Q{next(self._serial)}"
        name = f"{file}.{HOSTNAME}"
        mail = ReceivedMail(
            started_at=started_at,
            received_at=received_at,
            mail_from=mail_from,
            rcpt_tos=rcpt_tos,
            message_id=message_id_of(content),
            bytes=len(content),
            file=name,
        )
        written = self.maildir / "tmp" / name
        with os.fdopen(open_private(written, _CREATE), "wb") as opened:
            opened.write(content)
        written.rename(self.maildir / "new" / name)
        self._record.append(mail)
        return mail


def message_id_of(content: bytes) -> str:
    """Return the Message-ID of a mail, with its angle brackets; empty if it has none."""
    headers = content[: content.find(_END_OF_HEADERS) + 2] or content
    found = MESSAGE_ID.search(headers)
    return found[1].rstrip().decode("utf-8", "replace") if found else ""
