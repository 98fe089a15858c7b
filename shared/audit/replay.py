"""Computes the gaps and windows of one sender's sends from their start and end times.

Pure arithmetic. Times are numbers in one unit of the caller's choice: ints of microseconds are
exact; floats of seconds since 1970 are exact to 0.3 us.

The limits of a sender are implemented here, in limits.lua (which decides), simulation.py (forecast)
and queue_model.py (tests), and named in explaining.py: sender_limits.py has the list. The replay
checks only the limits that the attempts can prove.
Without Limit.IN_FLIGHT: not audited; with a gap, two sends at once show as a negative gap.
Without Limit.PAUSE: when a sender was paused is not stored.
Without Limit.SENDING_HOURS: the sending hours of the past are not stored.
Without Limit.COOLDOWN: the cooldowns of the past are not stored.
Without Limit.CIRCUIT: only Redis knows circuits, and no longer than they last.
Without Limit.PACE: only Redis knows the pace, and no longer than it lasts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from typing import TypeVar

Time = TypeVar("Time", int, float)


def least_gap(sends: Iterable[tuple[Time, Time]]) -> Time | None:
    """Return the shortest time from the end of a send of one sender to the start of its next.

    `sends` are (start, end), in any order. A negative result means that two sends overlapped, None
    that there were fewer than two sends.
    """
    # Neighbours suffice: a send that outlasts the next one has its least gap (negative) to that.
    neighbours = pairwise(sorted(sends))
    return min((start - end for (_, end), (start, _) in neighbours), default=None)


def most_in_window(ends: Iterable[Time], window: Time) -> int:
    """Return the largest number of sends of one sender that ended in one trailing window.

    At the instant t the window is (t - window, t]: an end leaves it exactly `window` later.
    """
    inside: deque[Time] = deque()
    most = 0
    for end in sorted(ends):
        while inside and inside[0] <= end - window:
            inside.popleft()
        inside.append(end)
        most = max(most, len(inside))
    return most


class Replay:
    """Replays the sends of one sender or user, in the order of their ends.

    It needs the memory of one window.

    Times are seconds. Sends that started before `since` are not checked, because other limits may
    have been valid then. They still count in the gap and window of later sends.
    """

    def __init__(self, window: float, limit: int, since: float | None = None) -> None:
        self._window = window
        self._limit = limit
        self._since = since
        self._inside: deque[float] = deque()
        self._last_end: float | None = None
        self.sends = 0
        self.checked = 0
        # Equal to the function `least_gap` of these sends; if sends overlap, both are negative.
        self.least_gap: float | None = None
        self.most_in_window = 0
        # The shortest time in which `limit + 1` sends ended. None if no window had so many.
        self.shortest: float | None = None

    def add(self, start: float, end: float) -> None:
        """Replay the next send. It must not end before the last one."""
        inside = self._inside
        while inside and inside[0] <= end - self._window:
            inside.popleft()
        inside.append(end)
        before, self._last_end = self._last_end, end
        self.sends += 1
        if self._since is not None and start < self._since:
            return
        self.checked += 1
        self.most_in_window = max(self.most_in_window, len(inside))
        # Limit.WINDOW, and Limit.USER_WINDOW with the sends of all senders of a user.
        if len(inside) > self._limit:
            span = end - inside[-1 - self._limit]
            self.shortest = span if self.shortest is None else min(self.shortest, span)
        # Limit.GAP, Limit.USER_GAP
        if before is not None:
            gap = start - before
            self.least_gap = gap if self.least_gap is None else min(self.least_gap, gap)

    def overshoot(self, slack: float = 0.0) -> int:
        """Return the largest number of mails by which a window exceeded the limit.

        `slack` is the error that the time between two ends may have. An excess that it explains
        does not count.
        """
        if self.shortest is None or self.shortest > self._window - slack:
            return 0
        return self.most_in_window - self._limit
