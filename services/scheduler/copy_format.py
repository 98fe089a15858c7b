"""Formats rows for COPY ("Text Format" in PostgreSQL's documentation of COPY) and for INSERT."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from outbox_server.services.scheduler.planning import OwnTimes
from outbox_server.shared.intake.addresses import folded_key
from outbox_server.shared.intake.rows import JobRow, RowRejection
from outbox_server.shared.intake.tags import RowTags, external_key

_MILLISECOND = timedelta(milliseconds=1)
_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\0": ""})


class Schedule:
    """Calculates when each accepted row is due and when it expires.

    A row is due at its own `schedule_time`, or else at the start plus its place times the spacing.
    It expires `expire_after_ms` later; None means never. `last_due` is the latest due time so far.

    If the batch is `spread`, rows without a time of their own get their place instead, because
    their times are known only after the last row.
    """

    def __init__(
        self,
        start: datetime,
        accepted_at: datetime,
        spacing_ms: int,
        expire_after_ms: int | None = None,
        *,
        spread: bool = False,
        own_times: OwnTimes | None = None,
    ) -> None:
        """Add the rows' own times to `own_times`, if it is given."""
        self._own_times = own_times
        self._start = start
        self._accepted_at = accepted_at
        self._spacing = spacing_ms * _MILLISECOND
        self._expire_after = None if expire_after_ms is None else expire_after_ms * _MILLISECOND
        self._spread = spread
        self._place = 0
        self.last_due: datetime | None = None

    def times(self, rows: Sequence[JobRow]) -> list[str]:
        """Return (scheduled_at, expires_at) of the next rows, in COPY's format.

        For a spread batch it is (place, scheduled_at, expires_at): either the place or both times
        are NULL.

        Raises:
            OverflowError: a time is beyond the year 9999.
        """
        if self._spread:
            return [self._place_or_time(row) for row in rows]
        if not self._spacing and not any(row.schedule_time for row in rows):
            self._note(self._start)
            return [self._format(self._start)] * len(rows)
        times = []
        for row in rows:
            if row.schedule_time is None:
                due = self._start + self._place * self._spacing
            else:
                due = self._own(row.schedule_time)
            self._place += 1
            self._note(due)
            times.append(self._format(due))
        return times

    @property
    def places(self) -> int:
        """The number of rows of a spread batch that have a place so far."""
        return self._place

    def _place_or_time(self, row: JobRow) -> str:
        if row.schedule_time is None:
            self._place += 1
            return f"{self._place - 1}\t\\N\t\\N"
        due = self._own(row.schedule_time)
        self._note(due)
        return f"\\N\t{self._format(due)}"

    def _own(self, schedule_time: datetime) -> datetime:
        due = max(schedule_time, self._accepted_at)
        if self._own_times is not None:
            self._own_times.add(due)
        return due

    def _format(self, due: datetime) -> str:
        if self._expire_after is None:
            return f"{due.isoformat()}\t\\N"
        return f"{due.isoformat()}\t{(due + self._expire_after).isoformat()}"

    def _note(self, due: datetime) -> None:
        if self.last_due is None or due > self.last_due:
            self.last_due = due


def format_jobs(
    rows: Sequence[JobRow],
    times: Iterable[str],
    first_id: int,
    batch_id: int,
    sender_id: int,
    *,
    tags_of: str | None = None,
) -> bytes:
    """Return the columns of each row: id, batch_id, sender_id, `times`, row_number, ...

    `tags_of` is the user of rows with ids or labels, which are the last columns; None: they have
    none, and no such columns.
    """
    head = f"{batch_id}\t{sender_id}\t"
    ids = range(first_id, first_id + len(rows))
    lines = []
    for job_id, row, time in zip(ids, rows, times, strict=True):
        # Variables are JSON, which contains no raw control characters.
        variables = "\\N" if row.variables is None else row.variables.replace("\\", "\\\\")
        recipient = row.recipient
        if "\\" in recipient:
            recipient = recipient.replace("\\", "\\\\")
        keys = "\\N\t\\N"
        if not recipient.isascii():
            folded = folded_key(row.recipient).translate(_ESCAPES)
            keys = f"{folded}\t{row.address_key.translate(_ESCAPES)}"
        tags = "" if tags_of is None else _tags(row.tags, tags_of)
        lines.append(
            f"{job_id}\t{head}{time}\t{row.row_number}\t{recipient}\t{keys}\t{variables}{tags}\n"
        )
    return "".join(lines).encode()


def job_values(
    rows: Sequence[JobRow],
    times: Iterable[str],
    first_id: int,
    batch_id: int,
    sender_id: int,
    *,
    user_id: str,
) -> list[dict[str, Any]]:
    """Return the same columns by name. `user_id` is the user of the batch."""
    found = []
    ids = range(first_id, first_id + len(rows))
    for job_id, row, time in zip(ids, rows, times, strict=True):
        due, expires = time.split("\t")
        recipient, tags = row.recipient, row.tags
        job: dict[str, Any] = {
            "id": job_id,
            "batch_id": batch_id,
            "sender_id": sender_id,
            "scheduled_at": due,
            "row_number": row.row_number,
            "recipient": recipient,
            "variables": row.variables,
        }
        if expires != "\\N":
            job["expires_at"] = expires
        if not recipient.isascii():
            job |= {"recipient_key": folded_key(recipient), "address_key": row.address_key}
        if tags is not None and tags.external_id is not None:
            key = external_key(user_id, tags.external_id)
            job |= {"external_id": tags.external_id, "external_key": key}
        if tags is not None and tags.labels is not None:
            job["labels"] = json.loads(tags.labels)
        found.append(job)
    return found


def _tags(tags: RowTags | None, user_id: str) -> str:
    """Return the columns external_id, external_key and labels, each after a separator."""
    external_id, labels = tags or (None, None)
    shown = "\\N\t\\N"
    if external_id is not None:
        shown = f"{external_id.translate(_ESCAPES)}\t{external_key(user_id, external_id)}"
    # JSON contains no raw control characters.
    return f"\t{shown}\t" + ("\\N" if labels is None else labels.replace("\\", "\\\\"))


def format_rejections(rejections: Sequence[RowRejection], batch_id: int) -> bytes:
    """Return (batch_id, row_number, column_name, reason, detail) of each rejection."""
    return "".join(
        f"{batch_id}\t{rejection.row_number}\t{rejection.column.translate(_ESCAPES)}"
        f"\t{rejection.reason}\t{rejection.message.translate(_ESCAPES)}\n"
        for rejection in rejections
    ).encode("utf-8", "replace")
