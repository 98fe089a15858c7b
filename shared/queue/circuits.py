"""Open circuits, and the changes of circuits, as the queue reports them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Circuit:
    """An open circuit: mail to the endpoint waits, while one probe at a time is sent.

    Times are Unix ms of Redis' clock.
    """

    # The sender whose connections failed. None means several senders of the endpoint.
    sender_id: int | None
    open_since_ms: int
    # If it is in the past, a probe is in flight, or is sent as soon as the limits allow it.
    next_probe_ms: int
    # Why the last connection failed, for people; never contains a password.
    reason: str


@dataclass(frozen=True, slots=True)
class CircuitChange:
    """A circuit has opened or closed. Only the process that caused the change gets it."""

    opened: bool
    # The same as in `Circuit`.
    sender_id: int | None
    open_since_ms: int
    reason: str
    # Host and port, for people. Empty if the circuit closed because its sender was changed.
    server: str = ""
    # The code of the reply, if `reason` is a reply of the server.
    smtp_code: int | None = None


def log_change(change: CircuitChange) -> None:
    """Log a change for the operator."""
    whose = {} if change.sender_id is None else {"sender": change.sender_id}
    where = {"endpoint": change.server} if change.server else {}
    what: dict[str, object]
    if change.opened and change.smtp_code is None:
        what = {"reason": change.reason}
    else:
        # A reply may quote the mail. Whether the reason of a closed circuit is one is not known.
        what = {"smtp_code": change.smtp_code, "reply": change.reason}
    _log.warning(
        "circuit_opened" if change.opened else "circuit_closed",
        **where,
        **whose,
        since=datetime.fromtimestamp(change.open_since_ms / 1000, UTC).isoformat(),
        **{name: value for name, value in what.items() if value is not None},
    )
