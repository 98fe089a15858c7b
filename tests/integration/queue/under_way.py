"""The operations under way in a run of the model: loads, claims, limits, a snapshot."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

from outbox_server.shared.queue.records import Claim, Head, Settlement, UserHead
from tests.integration.queue.world import Send
from tests.integration.queue_state import HeadModel, UserHeadModel


class Step(Enum):
    """The steps of a dispatcher's claim that are done."""

    CLAIMED = auto()
    MARKED = auto()
    CONFIRMED = auto()
    BEGUN = auto()
    RECORDED = auto()


@dataclass
class LoadUnderWay:
    """A load under way: PostgreSQL was read, and Redis is not written yet."""

    sender_id: int
    epoch: str
    head: Head
    model: HeadModel
    markers: list[int]


@dataclass
class UserLoadUnderWay:
    """A load of a user's limits under way: PostgreSQL was read, and Redis is not written yet."""

    user: str
    epoch: str
    head: UserHead
    model: UserHeadModel


@dataclass
class ClaimUnderWay:
    """A claim that a dispatcher holds."""

    claim: Claim
    claimed: int
    deadline: int
    gap: int
    user_gap: int = 0
    # The lease in PostgreSQL, once the job is marked there.
    lease_until: int = 0
    # Redis confirmed that it still has the lease.
    confirmed: bool = False
    send: Send | None = None
    # The outcome to write to Redis after the send, and the time of its end.
    settlement: Settlement | None = None
    ended: int = 0
    # Whether it knows the current ends of its lease in both stores.
    known: bool = True
    # Only PostgreSQL has the time for which the job waits now.
    stale: bool = False

    def renewed(self, lease_ms: int) -> None:
        """Record the end of the lease that both stores have confirmed."""
        self.claim = replace(self.claim, lease_ms=lease_ms)
        self.known = True

    @property
    def step(self) -> Step:
        """The last step that was taken."""
        if self.settlement:
            return Step.RECORDED
        if self.send:
            return Step.BEGUN
        if self.confirmed:
            return Step.CONFIRMED
        return Step.MARKED if self.lease_until else Step.CLAIMED


@dataclass
class LimitHistory:
    """The limits of one sender or user, with the time from which each applied."""

    changes: list[tuple[int, Any]] = field(default_factory=list)

    def highest_since(self, time: int) -> Any:
        before = [limit for at, limit in self.changes if at < time][-1:]
        return max(before + [limit for at, limit in self.changes if at >= time])


@dataclass
class Snapshot:
    """All keys at an earlier time, with their remaining ms to live, and the model's data."""

    keys: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    ready: dict[int | str, int] = field(default_factory=dict)
    parked: dict[str, dict[int | str, int]] = field(default_factory=dict)
    parked_users: set[str] = field(default_factory=set)
    turns: dict[str, dict[int, int]] = field(default_factory=dict)
    everyone: tuple[int, int] = (0, 0)
