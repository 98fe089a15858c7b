"""Remembers which users got the last permits, so that the next claim prefers other users.

Otherwise a user whose backlog has waited longest would come first until all of it is sent.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import Final

# A user who got this part of an equal share of the last permits comes after other users.
_ENOUGH: Final = 0.75
# How many permits count as the last ones: this many per slot, and at most the second number.
_PER_SLOT: Final = 20
_MOST: Final = 200


class RecentPermits:
    """The users of the last permits of a dispatcher with `slots` slots."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._users: deque[str] = deque()
        # How many of these permits each user got.
        self._number_of: Counter[str] = Counter()
        # Whether the last claim preferred users who got none of them.
        self._preferred_new = True

    def add(self, user: str) -> None:
        """Note that a user got a permit."""
        self._users.append(user)
        self._number_of[user] += 1
        if len(self._users) > min(_PER_SLOT * self._slots, _MOST):
            oldest = self._users.popleft()
            self._number_of[oldest] -= 1
            if not self._number_of[oldest]:
                del self._number_of[oldest]

    def served(self) -> set[str]:
        """Return the users who got their part. Call it once for each claim.

        If one user alone got permits, nobody is returned: the reserve is for the others. In every
        second claim, a single permit counts as a part, because among many users there is always one
        who got a little less than the others.
        """
        if len(self._number_of) == 1 and self._slots > 1:
            return set()
        self._preferred_new = not self._preferred_new
        if self._preferred_new:
            return set(self._number_of)
        part = math.ceil(_ENOUGH * len(self._users) / max(1, len(self._number_of)))
        return {user for user, number in self._number_of.items() if number >= part}
