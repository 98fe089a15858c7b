"""Times of a forecast: whole microseconds since 1970."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)


def to_us(time: datetime) -> int:
    """Return the time in whole microseconds since 1970."""
    return (time - _EPOCH) // MICROSECOND


def from_us(microseconds: int) -> datetime:
    """Return the UTC time of `microseconds` since 1970.

    Raises:
        OverflowError: it is beyond the year 9999.
    """
    return _EPOCH + microseconds * MICROSECOND
