"""What the model of the queue holds of senders, users, endpoints and loads.

queue_model.py describes the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

INFINITY = float("inf")
# The number of connection failures in a row that open a circuit; ms between two rechecks of a
# waiter.
FAILURES = 3
RECHECK = 30_000
# Stands for a window of a user that is not limited.
NO_LIMIT = 999_999_999
# The learned pace: its first and its longest gap, and the factor by which it shrinks.
PACE_FIRST = 125
PACE_MOST = 60_000
PACE_SHRINKS_TO = 0.9


@dataclass
class CircuitModel:
    """The state of one endpoint in the queue."""

    failures: int = 0
    # The senders of these failures.
    senders: set[int] = field(default_factory=set)
    open: bool = False
    next: int = 0
    step: int = 0
    probe: tuple[int, str] | None = None
    busy_until: int = 0
    # For each waiting sender, the time from which it could send without the circuit.
    waiters: dict[int, int] = field(default_factory=dict)

    @property
    def turn(self) -> int:
        """Return the time of the next probe."""
        return max(self.next, self.busy_until)

    @property
    def first(self) -> int | None:
        """Return the waiter that has been able to send for the longest time."""
        return min(((at, str(s), s) for s, at in self.waiters.items()), default=(0, "", None))[2]

    def admits(self, now: int) -> bool:
        return not self.open or self.turn <= now


@dataclass
class SenderModel:
    """The state of one sender in the queue."""

    epoch: int
    limit: int = 1
    # The sender's own gap, and the pace learned from its server; 0 means none.
    own_gap: int = 0
    pace: int = 0
    flight: int = 1
    active: bool = True
    horizon: float = INFINITY
    # A load was requested, and is requested again at this time.
    loading: int | None = None
    last_end: int = 0
    due: dict[str, int] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)
    # The leases that its history brought.
    restored: dict[str, int] = field(default_factory=dict)
    # Ends that take an entry of the window, by job and attempt. A "?" marks each assumed end.
    entries: dict[str, int] = field(default_factory=dict)
    # A load was refused, and none has succeeded since.
    refused: bool = False
    # The last load left out a job because it was claimed.
    left_out: bool = False
    # No job waits or is in flight: the sender is deleted together with its history.
    idle: bool = False
    endpoint: str = ""
    revision: int = 0
    # The user who owns it.
    user: str = ""
    # Whether limits were set for that user alone.
    user_limited: bool = False
    # The sender's own circuit: failures in a row, whether it is open, the next probe and its lease.
    troubles: int = 0
    open: bool = False
    probe: int = 0
    step: int = 0
    prober: str | None = None
    # The time of the next probe if the sender is in a cooldown, otherwise 0.
    cool: int = 0

    @property
    def gap(self) -> int:
        """The gap that applies: Limit.GAP or Limit.PACE."""
        return max(self.own_gap, self.pace)

    @property
    def places(self) -> int:
        """How many more sends may be in flight: Limit.IN_FLIGHT."""
        most = 1 if self.gap or self.open or self.cool else self.flight
        return min(most, self.limit) - len(self.leases)

    @property
    def first(self) -> tuple[int, str] | None:
        """The next job in the order of (due, id)."""
        return min(((due, member) for member, due in self.due.items()), default=None)

    def allowed_at(self, window: int) -> int:
        """Return the earliest instant at which the limits allow one more send.

        Limit.WINDOW, Limit.CIRCUIT (the sender's own), Limit.COOLDOWN and Limit.GAP.
        """
        room = self.limit - len(self.leases)
        ends = self.entries.values()
        instants = (0, *(end + window for end in ends))
        free = min(t for t in instants if sum(end + window > t for end in ends) < room)
        return max(free, self.probe, self.cool, self.last_end + self.gap if self.gap else 0)

    def slow_down(self) -> None:
        """Raise the pace, because mail comes too fast. Sends begun before the pace do not count."""
        if not self.pace or not self.leases:
            self.pace = min(PACE_MOST, max(2 * self.gap, PACE_FIRST))

    def speed_up(self) -> None:
        """Record that a mail was accepted."""
        if self.pace and not self.leases:
            pace = math.floor(self.pace * PACE_SHRINKS_TO)
            self.pace = pace if pace > max(self.own_gap, PACE_FIRST / 2) else 0


@dataclass(frozen=True)
class HeadModel:
    """The contents of a load."""

    limit: int
    gap: int
    flight: int
    active: bool
    endpoint: str
    revision: int
    user: str
    user_limited: bool
    jobs: Sequence[tuple[str, int]]
    more: bool
    # Member, ms since its end, whether it takes an entry.
    ends: Sequence[tuple[str, int, bool]] = ()
    # Member, remaining ms.
    leases: Sequence[tuple[str, int]] = ()
    # ms until the next probe; 0 means no cooldown.
    cooldown: int = 0


@dataclass(frozen=True)
class UserHeadModel:
    """The contents of a load of a user's limits; None means those of all users."""

    limit: int | None
    gap: int | None
    ends: Sequence[tuple[str, int, bool]] = ()
    leases: Sequence[tuple[str, int]] = ()


@dataclass
class UserModel(SenderModel):
    """The limits that a user has for all its senders: Limit.USER_WINDOW and Limit.USER_GAP.

    They work like those of a sender without jobs.
    """

    own: tuple[int | None, int | None] = (None, None)

    def apply(self, everyone: tuple[int, int]) -> None:
        """Compute the limits that apply, with those of users without limits of their own."""
        limit, gap = self.own
        self.limit = self.flight = (everyone[0] if limit is None else limit) or NO_LIMIT
        self.own_gap = everyone[1] if gap is None else gap


def limiter_of(user: str) -> str:
    """Return the member of a user's limiter in `ready`."""
    return f"u:{user}"


def wait_of(backoff: Sequence[int], number: int) -> int:
    return backoff[min(number, len(backoff)) - 1]
