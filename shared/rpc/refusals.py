"""Refuses the calls of one user at a limited rate, so that a client that ignores RetryInfo waits.

A refusal is quick. A client that makes each refused call again at once, a few hundred at a time,
would use all the time of the event loop.
"""

from __future__ import annotations

import asyncio
import math
from typing import Final

from outbox_server.shared.fair_shares import Claimant, FairShares

# A user's first refusals come at once, and then one in this time, in seconds.
_AT_ONCE: Final = 100
_EVERY_S: Final = 0.01
# The maximum number of refusals that wait, of all users. One user alone has three quarters of the
# users' places. Further calls are refused at once, because each call that waits uses memory.
_WAITING: Final = 512
# How many users are remembered before those without refusals in the last second are forgotten.
_USERS: Final = 1_000


class RefusalRate:
    """The refusals of a server."""

    def __init__(self) -> None:
        self._waiting = FairShares("refusals", _WAITING)
        # When the next refusal of a user is due.
        self._due: dict[Claimant, float] = {}

    async def wait(self, claimant: Claimant) -> None:
        """Wait until a call may be refused. Operators do not wait."""
        if claimant.privileged or not self._waiting.try_take(claimant):
            return
        try:
            now = asyncio.get_running_loop().time()
            earliest = now - (_AT_ONCE - 1) * _EVERY_S
            if len(self._due) >= _USERS:
                self._due = {user: due for user, due in self._due.items() if due > earliest}
            due = max(self._due.get(claimant, -math.inf), earliest)
            self._due[claimant] = due + _EVERY_S
            if due > now:
                await asyncio.sleep(due - now)
        finally:
            self._waiting.give_back(claimant)
