"""Measures how long the event loop of a process is blocked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from prometheus_client import CollectorRegistry, Gauge, Histogram

# A stall of this length or more is always seen. Ten wake-ups a second cost 0.05 % of a core.
_INTERVAL: Final = timedelta(milliseconds=100)
# The gauge shows the longest stall within this time, or up to twice this time, so that every
# scraper sees it.
_SPAN: Final = timedelta(minutes=1)
_SECONDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class StallWatch:
    """Wakes up regularly and records how much too late it was. `clock` is monotonic, in seconds."""

    def __init__(
        self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._stalls = Histogram(
            "outbox_event_loop_stall_seconds",
            "How much too late the event loop ran a timer, ten times a second.",
            buckets=_SECONDS,
            registry=registry,
        )
        longest = Gauge(
            "outbox_event_loop_longest_stall_seconds",
            "The longest stall of the last one to two minutes.",
            registry=registry,
        )
        longest.set_function(self._longest)
        # The longest stalls of the present span and of the span before it.
        self._span_began = clock()
        self._present = 0.0
        self._before = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        interval = _INTERVAL.total_seconds()
        while True:
            asleep = self._clock()
            await asyncio.sleep(interval)
            self.record(max(0.0, self._clock() - asleep - interval))

    def record(self, seconds: float) -> None:
        """Record that the loop was `seconds` late."""
        self._stalls.observe(seconds)
        self._begin_span()
        self._present = max(self._present, seconds)

    def _begin_span(self) -> None:
        spans = int((self._clock() - self._span_began) / _SPAN.total_seconds())
        if spans:
            self._before = self._present if spans == 1 else 0.0
            self._present = 0.0
            self._span_began += spans * _SPAN.total_seconds()

    def _longest(self) -> float:
        self._begin_span()
        return max(self._present, self._before)
