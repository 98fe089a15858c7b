"""Circuits as the queue tells of them: those that are open, and what opened or closed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Circuit:
    """An open circuit: what would fail as well waits, while one probe at a time is sent.

    Times are Unix ms of Redis' clock.
    """

    # Whose connections failed: this sender's alone; None: several senders' of the endpoint.
    sender_id: int | None
    open_since_ms: int
    # In the past: a probe is under way, or is sent as soon as the limits allow it.
    next_probe_ms: int
    # Of the last failure, for people; never a password.
    reason: str


@dataclass(frozen=True, slots=True)
class CircuitChange:
    """A circuit has opened or closed; of all processes only that which did it is told."""

    opened: bool
    # As in `Circuit`.
    sender_id: int | None
    open_since_ms: int
    reason: str
    # Host and port, for people; empty: it closed because its sender was changed.
    server: str = ""


def log_change(change: CircuitChange) -> None:
    """Write it down for the operator."""
    whose = {} if change.sender_id is None else {"sender": change.sender_id}
    where = {"endpoint": change.server} if change.server else {}
    _log.warning(
        "circuit_opened" if change.opened else "circuit_closed",
        **where,
        **whose,
        since=datetime.fromtimestamp(change.open_since_ms / 1000, UTC).isoformat(),
        reason=change.reason,
    )
