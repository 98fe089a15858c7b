"""What the promises on gap, window and duplicates come to, from the times of real sends alone.

Pure arithmetic. Times are numbers in one unit of the caller's choice: ints of microseconds are
exact; floats of seconds since 1970 are good to 0.3 us.
"""

from __future__ import annotations

from collections import Counter, deque
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


def sent_twice(message_ids: Iterable[str]) -> dict[str, int]:
    """Return how often each Message-ID came, for those that came more than once."""
    return {name: times for name, times in Counter(message_ids).items() if times > 1}
