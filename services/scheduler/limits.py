"""Calculates which of a sender's limits binds. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from outbox_server.shared.durations import format_duration

_HOUR: Final = timedelta(hours=1)
_ZERO: Final = timedelta(0)


@dataclass(frozen=True, slots=True)
class Limits:
    """The hourly limit and the effective gap of a sender."""

    hourly_limit: int
    gap: timedelta

    @property
    def gap_binds(self) -> bool:
        """Whether the gap allows fewer mails an hour than `hourly_limit` does."""
        return self.effective_hourly_limit < self.hourly_limit

    @property
    def effective_hourly_limit(self) -> int:
        """The number of mails per hour that both limits allow: at least one."""
        if self.gap == _ZERO:
            return self.hourly_limit
        return min(self.hourly_limit, max(_HOUR // self.gap, 1))

    def notice(self) -> str:
        """Return a sentence for people if the gap binds, otherwise an empty text."""
        if not self.gap_binds:
            return ""
        return (
            f"The gap of {format_duration(self.gap)} binds: it allows "
            f"{self.effective_hourly_limit} mails an hour, fewer than the hourly limit of "
            f"{self.hourly_limit}."
        )
