"""Remembers who called lately: work of a user gives way only while others call as well."""

from __future__ import annotations

import math
from typing import Final

from outbox_server.shared.fair_shares import NOBODY, Claimant

# How long a caller counts as present after its last call, in seconds.
_PRESENT_S: Final = 2.0


class RecentCallers:
    """The last claimant that called, and the last other one. Times are those of the event loop."""

    def __init__(self) -> None:
        self._last = self._last_other = (NOBODY, -math.inf)

    def note(self, claimant: Claimant, now: float) -> None:
        """Note a call. Operators do not count: nobody has to wait because an operator calls."""
        if claimant.privileged:
            return
        if self._last[0] != claimant:
            self._last_other = self._last
        self._last = (claimant, now)

    def others_call(self, claimant: Claimant, now: float) -> bool:
        """Return whether another claimant has called within the last seconds."""
        _, at = self._last if self._last[0] != claimant else self._last_other
        return now - at < _PRESENT_S

    def several_call(self, now: float) -> bool:
        """Return whether two claimants or more have called within the last seconds."""
        return now - self._last_other[1] < _PRESENT_S
