"""By how much Redis' clock is ahead of PostgreSQL's, from readings of both.

PostgreSQL's clock decides when a mail is due, and Redis hands out the mail. Redis' clock is always
read first, so a difference is never larger than the true one. So a claim may be too early, which
PostgreSQL notices, but a slow answer of a store never makes it late.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final

# The largest difference within this time counts, because other readings took longer. So a clock
# that was corrected delays mail for at most this time.
_KEPT_S: Final = 60.0
_MOST: Final = 100


class ClockDifference:
    """Keeps the last readings."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, int]] = deque(maxlen=_MOST)

    def learn(self, ahead_ms: int) -> None:
        """Note Redis' time minus PostgreSQL's, read in this order."""
        self._readings.append((time.monotonic(), ahead_ms))

    def ms(self) -> int:
        """Return by how many ms Redis' clock is ahead; 0 if it is behind or nothing is known."""
        since = time.monotonic() - _KEPT_S
        while self._readings and self._readings[0][0] < since:
            self._readings.popleft()
        return max([0, *(ahead for _, ahead in self._readings)])
