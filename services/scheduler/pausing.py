"""Checks until when a sender or a batch is to be paused. Pure."""

from __future__ import annotations

from datetime import datetime

from outbox_server.shared import bounds
from outbox_server.shared.errors import InvalidInput


def check_pause_end(until: datetime | None, now: datetime) -> None:
    """Check the end of a pause; None means that only a call ends it. `now` is PostgreSQL's time.

    Raises:
        InvalidInput: PAUSE_END_TIME_INVALID.
    """
    if until is not None and not now < until <= now + bounds.MAX_PAUSE:
        raise InvalidInput.field(
            "pause_end_time",
            f"must be in the future, at most {bounds.MAX_PAUSE.days} days away "
            f"(got {until:%Y-%m-%dT%H:%M:%SZ}); leave it unset for a pause that only a call ends",
            reason="PAUSE_END_TIME_INVALID",
        )
