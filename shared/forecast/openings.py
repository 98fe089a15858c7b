"""The sending hours of a sender in microseconds, for the simulation. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from outbox_server.shared.sending_hours import SendingHours

_MILLISECOND: Final = 1_000


@dataclass(frozen=True, slots=True)
class Openings:
    """Sending hours, whose openings begin and end at whole milliseconds."""

    hours: SendingHours

    @classmethod
    def from_text(cls, text: str) -> Openings:
        """Return the openings of stored sending hours."""
        return cls(SendingHours.from_text(text))

    def opens(self, at: int) -> int | None:
        """Return the first open instant from `at` on; None if none is found."""
        try:
            found = self.hours.opens(at // _MILLISECOND)
        except OverflowError:
            # The calendar ends with the year 9999.
            return None
        return None if found is None else max(found * _MILLISECOND, at)

    def closes(self, at: int) -> int:
        """Return when the opening at `at` closes. Another opening may follow at once."""
        try:
            return self.hours.closes(at // _MILLISECOND) * _MILLISECOND
        except OverflowError:
            return at
