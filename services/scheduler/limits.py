"""What a sender's limits come to: which one binds, and when a batch will be done. Pure.

Lower bounds on time, as if a send took none.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from shared.settings import format_duration

_HOUR: Final = timedelta(hours=1)
_ZERO: Final = timedelta(0)


@dataclass(frozen=True, slots=True)
class Limits:
    """The two limits of a sender, as they hold: `gap` is not below the operator's floor."""

    hourly_limit: int
    gap: timedelta
    # In which `hourly_limit` is counted (OUTBOX_RATE_WINDOW).
    window: timedelta = _HOUR

    @classmethod
    def of(
        cls, hourly_limit: int, min_gap_ms: int | None, floor: timedelta, window: timedelta = _HOUR
    ) -> Limits:
        """Return the limits of a sender; `min_gap_ms` None: the operator's floor."""
        return cls(hourly_limit, max(floor, timedelta(milliseconds=min_gap_ms or 0)), window)

    @property
    def gap_binds(self) -> bool:
        """Whether the gap allows fewer mails an hour than `hourly_limit` does."""
        return self.effective_hourly_limit < self.hourly_limit

    @property
    def effective_hourly_limit(self) -> int:
        """The most mails an hour that both allow: one at least, however long the gap is."""
        if self.gap == _ZERO:
            return self.hourly_limit
        return min(self.hourly_limit, max(_HOUR // self.gap, 1))

    def notice(self) -> str:
        """Return a sentence for people on which limit binds, if it is not the one they set."""
        if not self.gap_binds:
            return ""
        return (
            f"The gap of {format_duration(self.gap)} binds: it allows "
            f"{self.effective_hourly_limit} mails an hour, fewer than the hourly limit of "
            f"{self.hourly_limit}."
        )


@dataclass(frozen=True, slots=True)
class WindowUse:
    """What a sender has sent in the trailing window."""

    sends: int = 0
    # The end of the first of them.
    oldest: datetime | None = None


def forecast_end(
    limits: Limits,
    *,
    now: datetime,
    start: datetime,
    last_due: datetime,
    jobs: int,
    ahead: int = 0,
    used: WindowUse | None = None,
) -> datetime | None:
    """Return when the last of `jobs` will be sent, the earliest that the limits allow.

    `ahead` other jobs of the sender are taken to come first; none of the `jobs` is due before
    `start`, the last at `last_due`. None: nothing waits, or it is beyond the calendar.
    """
    if jobs <= 0:
        return None
    try:
        return max(
            last_due,
            max(now, start) + _duration(limits, jobs - 1, WindowUse(), now),
            now + _duration(limits, ahead + jobs - 1, used or WindowUse(), now),
        )
    except OverflowError:
        return None


def _duration(limits: Limits, before: int, used: WindowUse, now: datetime) -> timedelta:
    """Return how long after `now` a send can begin that has `before` others before it.

    A full window empties as it was filled: its n-th slot is free one window after its n-th send.
    """
    by_gap = before * limits.gap
    place = before + used.sends
    windows = place // limits.hourly_limit
    if not windows:
        return by_gap
    first = used.oldest or now
    by_window = windows * limits.window + place % limits.hourly_limit * limits.gap - (now - first)
    return max(by_gap, by_window)
