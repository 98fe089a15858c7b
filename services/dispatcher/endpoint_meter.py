"""Counts the attempts at each SMTP endpoint, with their latencies, for 5 to 10 minutes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.smtp.latencies import BUCKETS, bucket_of
from outbox_server.shared.states import ReplyClass

# The length of an interval. Figures cover two: the present one and the one before.
_INTERVAL_S: Final = 300.0
# The maximum number of endpoints that one interval counts, in all and of one user. Others are left
# out until the next interval.
_MOST: Final = 1_000
_MOST_OF_USER: Final = 50
_CLASSES: Final = max(ReplyClass) + 1


class EndpointName(NamedTuple):
    """An endpoint, by its user and its server. The relay has no user."""

    user_id: str
    host: str
    port: int


@dataclass(slots=True)
class EndpointFigures:
    """The counts of an endpoint: attempts by reply class (0: no reply) and by bucket of latency."""

    # Its key in Redis, for its circuit.
    circuit: str
    replies: list[int] = field(default_factory=lambda: [0] * _CLASSES)
    latencies: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def plus(self, other: EndpointFigures) -> EndpointFigures:
        """Return the sum of both."""
        return EndpointFigures(
            self.circuit,
            [a + b for a, b in zip(self.replies, other.replies, strict=True)],
            [a + b for a, b in zip(self.latencies, other.latencies, strict=True)],
        )


class EndpointMeter:
    """Counts attempts. `clock` is a monotonic clock in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._present: dict[EndpointName, EndpointFigures] = {}
        self._before: dict[EndpointName, EndpointFigures] = {}
        # The endpoints in the present interval, by user.
        self._of_users: Counter[str] = Counter()

    def count(self, endpoint: Endpoint, reply_class: ReplyClass | None, seconds: float) -> None:
        """Count an attempt that ended after some seconds."""
        self._begin_interval()
        name = EndpointName(endpoint.chosen_by, endpoint.host, endpoint.port)
        figures = self._present.get(name)
        if figures is None:
            if self._of_users[name.user_id] >= _MOST_OF_USER or len(self._present) >= _MOST:
                return
            self._of_users[name.user_id] += 1
            figures = self._present[name] = EndpointFigures(endpoint.circuit)
        # A new password gives a new key.
        figures.circuit = endpoint.circuit
        figures.replies[reply_class or 0] += 1
        figures.latencies[bucket_of(seconds)] += 1

    def figures(self) -> dict[EndpointName, EndpointFigures]:
        """Return the figures of all endpoints with attempts."""
        self._begin_interval()
        found = dict(self._before)
        for name, figures in self._present.items():
            before = found.get(name)
            found[name] = figures.plus(EndpointFigures("") if before is None else before)
        return found

    def _begin_interval(self) -> None:
        now = self._clock()
        while now - self._began >= _INTERVAL_S:
            self._began = max(self._began + _INTERVAL_S, now - _INTERVAL_S)
            self._before, self._present = self._present, {}
            self._of_users.clear()
