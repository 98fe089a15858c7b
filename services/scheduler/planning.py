"""The mails of a batch that is only checked, for its forecast. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from outbox_server.shared.forecast.simulation import JobGroup

# The maximum number of distinct times that are kept. If there are more, mails are assumed to be
# evenly spaced.
_MOST_TIMES: Final = 10_000
_EPOCH: Final = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
_MICROSECOND: Final = timedelta(microseconds=1)


class OwnTimes:
    """Counts the rows that have their own due time, in bounded memory."""

    def __init__(self) -> None:
        self.rows = 0
        self._first = self._last = _EPOCH
        self._counts: Counter[datetime] | None = Counter()

    def add(self, due: datetime) -> None:
        """Count a row."""
        self._first = min(self._first, due) if self.rows else due
        self._last = max(self._last, due) if self.rows else due
        self.rows += 1
        if self._counts is not None:
            self._counts[due] += 1
            if len(self._counts) > _MOST_TIMES:
                self._counts = None

    def groups(self, expire_after: int | None) -> list[JobGroup]:
        """Return the mails of these rows. `expire_after` is in microseconds."""
        if self._counts is None:
            return [_evenly(self._first, self._last, self.rows, expire_after)]
        return [
            JobGroup(_us(due), count, expire_after=expire_after)
            for due, count in sorted(self._counts.items())
        ]


def planned_mails(
    own: OwnTimes, accepted: int, start: datetime, last: datetime, expire_after_ms: int | None
) -> Sequence[JobGroup]:
    """Return the mails of a batch: those with own times, and others evenly until `last`."""
    expire_after = None if expire_after_ms is None else expire_after_ms * 1_000
    others = accepted - own.rows
    placed = [_evenly(start, last, others, expire_after)] if others else []
    return [*placed, *own.groups(expire_after)]


def _evenly(first: datetime, last: datetime, count: int, expire_after: int | None) -> JobGroup:
    step = (last - first) // _MICROSECOND // max(count - 1, 1)
    return JobGroup(_us(first), count, step, expire_after=expire_after)


def _us(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND
