"""Computes when a sender may send, from its sending hours. Pure.

Each day has at most one opening, from `start` to `end` by the wall clock of a time zone. An `end`
that is not after `start` belongs to the next day. If the clock skips a time, the opening begins or
ends at the skip; if the clock shows a time twice, the first one counts. Instants are Unix ms.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_SECOND: Final = timedelta(seconds=1)
_DAY: Final = timedelta(days=1)
_DAY_MINUTES: Final = 24 * 60
# The days around an instant that are searched for openings. Two weeks contain every opening of a
# week, even if a change of the clock, or of the date line, removes one.
_BEFORE, _AFTER = 2, 15


@dataclass(frozen=True, slots=True)
class SendingHours:
    """The hours in which a sender may send.

    `weekdays` are 1 (Monday) to 7; empty means all. `start` and `end` are minutes of the day.
    """

    weekdays: frozenset[int]
    start: int
    end: int
    zone: str

    def to_text(self) -> str:
        """Return the text that is stored."""
        return json.dumps([sorted(self.weekdays), self.start, self.end, self.zone])

    @classmethod
    def from_text(cls, text: str) -> SendingHours:
        """Return the hours of a stored text."""
        weekdays, start, end, zone = json.loads(text)
        return cls(frozenset(weekdays), start, end, zone)

    def opens(self, at: int) -> int | None:
        """Return the first open instant from `at` on; None if the next two weeks have none."""
        for begins, ends in self._openings(at):
            if ends > at:
                return max(begins, at)
        return None

    def closes(self, at: int) -> int:
        """Return when the opening that contains `at` ends, within the days that are searched."""
        until = at
        for begins, ends in self._openings(at):
            if begins > until:
                break
            until = max(until, ends)
        return until

    def _openings(self, at: int) -> Iterator[tuple[int, int]]:
        """Yield the openings around `at`, in order."""
        zone = ZoneInfo(self.zone)
        today = (_EPOCH + at * _MILLISECOND).astimezone(zone).date()
        for offset in range(-_BEFORE, _AFTER):
            day = today + offset * _DAY
            if self.weekdays and day.isoweekday() not in self.weekdays:
                continue
            begins = _instant(self.zone, day, self.start)
            ends = _instant(
                self.zone, day, self.end + (_DAY_MINUTES if self.end <= self.start else 0)
            )
            if begins < ends:
                yield begins, ends


@lru_cache(maxsize=4096)
def _instant(zone_name: str, day: date, minutes: int) -> int:
    """Return the first instant at which the clock shows this time of this day, or a later time."""
    zone = ZoneInfo(zone_name)
    wall = datetime.combine(day, time()) + timedelta(minutes=minutes)
    found = wall.replace(tzinfo=zone).astimezone(UTC)
    if found.astimezone(zone).replace(tzinfo=None) != wall:
        found = _skip_before(found, zone, wall)
    return (found - _EPOCH) // _MILLISECOND


def _skip_before(after: datetime, zone: ZoneInfo, wall: datetime) -> datetime:
    """Return the instant at which the clock skipped `wall`; `after` is a little later."""
    before = wall.replace(tzinfo=zone, fold=1).astimezone(UTC)
    while after - before > _SECOND:
        middle = before + (after - before) // 2
        if middle.astimezone(zone).replace(tzinfo=None) < wall:
            before = middle
        else:
            after = middle
    return after.replace(microsecond=0)
