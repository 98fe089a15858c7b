"""Gaps and windows of the sends of one sender, from their start and end times.

Pure arithmetic. Times are numbers in one unit of the caller's choice: ints of microseconds are
exact; floats of seconds since 1970 are good to 0.3 us.

The limits of a sender are implemented here, in look.lua (which decides), simulation.py (forecast)
and queue_model.py (tests), and named in explaining.py: sender_limits.py has the list. The replay
judges what the attempts alone prove.
Without Limit.IN_FLIGHT: no promise of the audit; with a gap, two at once show as a negative gap.
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
    """Return the least time from the end of a send of one sender to the start of its next.

    `sends` are (start, end), in any order. Negative: two overlapped. None: fewer than two sends.
    """
    # Neighbours will do: a send that outlasts its next has its least gap, a negative one, to that.
    neighbours = pairwise(sorted(sends))
    return min((start - end for (_, end), (start, _) in neighbours), default=None)


def most_in_window(ends: Iterable[Time], window: Time) -> int:
    """Return the most sends of one sender whose ends lie in one trailing window.

    At the instant t the window is (t - window, t]: an end has left it exactly `window` later.
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
    """The sends of one sender, given in the order of their ends; holds no more than a window's.

    Times are seconds. With `since`, what started earlier is not judged, for other limits may have
    held then; in a later send's gap and window it counts all the same.
    """

    def __init__(self, window: float, limit: int, since: float | None = None) -> None:
        self._window = window
        self._limit = limit
        self._since = since
        self._inside: deque[float] = deque()
        self._last_end: float | None = None
        self.sends = 0
        self.judged = 0
        # Equal to `least_gap` of all; where sends overlap, negative like that.
        self.least_gap: float | None = None
        self.most_in_window = 0
        # The least time in which one send more than the limit ended; None: no window held that.
        self.shortest: float | None = None

    def add(self, start: float, end: float) -> None:
        """Replay one send more, whose end is not before the last one's."""
        inside = self._inside
        while inside and inside[0] <= end - self._window:
            inside.popleft()
        inside.append(end)
        before, self._last_end = self._last_end, end
        self.sends += 1
        if self._since is not None and start < self._since:
            return
        self.judged += 1
        self.most_in_window = max(self.most_in_window, len(inside))
        # Limit.WINDOW
        if len(inside) > self._limit:
            span = end - inside[-1 - self._limit]
            self.shortest = span if self.shortest is None else min(self.shortest, span)
        # Limit.GAP
        if before is not None:
            gap = start - before
            self.least_gap = gap if self.least_gap is None else min(self.least_gap, gap)

    def overshoot(self, slack: float = 0.0) -> int:
        """Return by how many mails the limit was exceeded in some window.

        `slack`: by how much the time between two ends may be wrong; what it explains is none.
        """
        if self.shortest is None or self.shortest > self._window - slack:
            return 0
        return self.most_in_window - self._limit
