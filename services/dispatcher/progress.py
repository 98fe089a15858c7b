"""Counts what a dispatcher has sent, in total and over the last minute."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_SPAN_S = 60


class Progress:
    """Counts attempts. `clock` is a monotonic clock in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        # One entry per second: [second, attempts, sent].
        self._seconds: deque[list[int]] = deque()
        self.attempt_count = 0
        self.sent_count = 0

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def count(self, *, sent: bool) -> None:
        """Count one attempt that ended."""
        second = int(self._clock())
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0, 0])
            self._forget(second)
        self._seconds[-1][1] += 1
        self._seconds[-1][2] += sent
        self.attempt_count += 1
        self.sent_count += sent

    def rates(self) -> tuple[float, float]:
        """Return attempts and mails sent per second, over the last minute or since the start."""
        self._forget(int(self._clock()))
        span = min(_SPAN_S, max(1.0, self.uptime))
        attempts = sum(entry[1] for entry in self._seconds)
        sent = sum(entry[2] for entry in self._seconds)
        return attempts / span, sent / span

    def _forget(self, second: int) -> None:
        while self._seconds and self._seconds[0][0] <= second - _SPAN_S:
            self._seconds.popleft()
