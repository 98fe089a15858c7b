"""Computes the effective gap of a sender. Pure."""

from __future__ import annotations

from datetime import timedelta


def effective_gap(min_gap_ms: int | None, floor: timedelta) -> timedelta:
    """Return the time from the end of a send to the start of the sender's next one.

    `min_gap_ms` is the sender's own gap; None means that it has none. `floor` is OUTBOX_MIN_GAP. It
    also holds for senders whose own gap was stored before the operator raised the floor.
    """
    return max(floor, timedelta(milliseconds=min_gap_ms or 0))
