"""Decides how many jobs a claim takes ahead, for the slots that will be free next.

While one group of mails gets its slots, the next one is claimed. Jobs are claimed ahead only while
sends end quickly, so they wait briefly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

# Jobs are claimed ahead for as many sends as ended within this time, so they wait about as long.
_LATELY_S: Final = 0.05
# The maximum number of jobs claimed ahead per slot.
AHEAD_PER_SLOT: Final = 2
# Jobs are claimed ahead when this share of that number is free, because each claim has a fixed
# cost.
_LEAST_PART: Final = 0.4


class ClaimsAhead:
    """Counts the claims ahead of a dispatcher with `slots` slots. `clock` is in seconds."""

    def __init__(self, slots: int, clock: Callable[[], float]) -> None:
        self._slots = slots
        self._clock = clock
        # How many sends ended lately, and when.
        self._ended: deque[tuple[float, int]] = deque()
        # Claims that wait and were claimed ahead.
        self.waiting = 0
        # Those that claims under way may bring.
        self.taken = 0

    def sends_ended(self, number: int) -> None:
        """Note that sends have just ended."""
        self._ended.append((self._clock(), number))

    def room(self, may_wait: int) -> int:
        """Return how many jobs a claim may take ahead now, if `may_wait` more claims may wait."""
        since = self._clock() - _LATELY_S
        while self._ended and self._ended[0][0] < since:
            self._ended.popleft()
        if not self._ended:
            return 0
        most = min(AHEAD_PER_SLOT * self._slots, sum(number for _, number in self._ended))
        room = max(0, min(most - self.waiting, may_wait) - self.taken)
        return room if room >= most * _LEAST_PART else 0
