"""Lets the calls of a user run one at a time while others call as well.

All calls of a server share one event loop. At each of its waits, a call lets one step of every
other running call go first. So many calls of one user, however cheap, would make each call of
another user slow, although places are free. A call that has run for a while does not count any
more: it spends its time waiting, for PostgreSQL or for its caller.

Calls of operators and of services are not held up. Nothing is stored about a user without calls.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from outbox_server.shared.fair_shares import NOBODY, Claimant

# How many calls of a user run at once while others call. With two, a call of another user took up
# to five times as long beside a flood, with one about twice.
AT_ONCE: Final = 1
# For how long a running call counts, in seconds.
_COUNTS_S: Final = 0.05
# How long a caller counts as present after its last call, in seconds.
_COMPANY_S: Final = 2.0
_KIND: Final = "user"


class Turns:
    """The running calls of all users of a server."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._at_once = at_once
        self._users: dict[Claimant, _CallsOfUser] = {}
        # The last claimant who began a call, and the last other one, with their times.
        self._last = self._last_other = (NOBODY, -math.inf)

    @property
    def waiting(self) -> int:
        """How many calls wait."""
        return sum(len(calls.waiting) for calls in self._users.values())

    @asynccontextmanager
    async def entered(self, claimant: Claimant) -> AsyncIterator[Turn]:
        """Wait until a call may run, and count it until the end of the block."""
        turn = Turn(self, claimant)
        await turn.take()
        try:
            yield turn
        finally:
            turn.leave()

    def note(self, claimant: Claimant, now: float) -> None:
        """Note that this claimant calls."""
        if self._last[0] != claimant:
            self._last_other = self._last
        self._last = (claimant, now)

    def has_company(self, claimant: Claimant, now: float) -> bool:
        """Return whether another claimant has called within the last seconds."""
        _, at = self._last if self._last[0] != claimant else self._last_other
        return now - at < _COMPANY_S

    def calls_of(self, claimant: Claimant) -> _CallsOfUser:
        """Return the calls of a user."""
        found = self._users.get(claimant)
        if found is None:
            found = self._users[claimant] = _CallsOfUser()
        return found

    def serve(self, claimant: Claimant) -> None:
        """Let those go on that may, and forget a user without calls."""
        calls = self._users.get(claimant)
        if calls is None:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        while calls.waiting and self.admits(claimant, calls, now):
            turn, future = calls.waiting.popleft()
            if not future.done():  # its call was not cancelled
                calls.running[turn] = now
                future.set_result(None)
        if calls.timer is not None:
            calls.timer.cancel()
            calls.timer = None
        if calls.waiting:
            oldest = next(iter(calls.running.values()))
            calls.timer = loop.call_at(oldest + _COUNTS_S, self.serve, claimant)
        elif not calls.running:
            del self._users[claimant]

    def admits(self, claimant: Claimant, calls: _CallsOfUser, now: float) -> bool:
        """Return whether one more call of a user may run."""
        if len(calls.running) < self._at_once:
            return True
        # The oldest ones come first.
        while calls.running:
            oldest = next(iter(calls.running))
            if now - calls.running[oldest] < _COUNTS_S:
                break
            del calls.running[oldest]
        return len(calls.running) < self._at_once or not self.has_company(claimant, now)


class Turn:
    """The turn of one call."""

    __slots__ = ("_claimant", "_is_limited", "_turns")

    def __init__(self, turns: Turns, claimant: Claimant) -> None:
        self._turns = turns
        self._claimant = claimant
        self._is_limited = claimant.kind == _KIND and not claimant.privileged

    async def take(self) -> None:
        """Wait until the call may run."""
        turns, claimant = self._turns, self._claimant
        now = asyncio.get_running_loop().time()
        turns.note(claimant, now)
        if not self._is_limited:
            return
        calls = turns.calls_of(claimant)
        if not calls.waiting and turns.admits(claimant, calls, now):
            calls.running[self] = now
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        calls.waiting.append((self, future))
        if calls.timer is None:
            turns.serve(claimant)
        try:
            await future
        except asyncio.CancelledError:
            self.leave()
            raise

    def leave(self) -> None:
        """Let another call run. May be called again."""
        if not self._is_limited:
            return
        calls = self._turns.calls_of(self._claimant)
        calls.running.pop(self, None)
        self._turns.serve(self._claimant)


class _CallsOfUser:
    """The calls of one user."""

    __slots__ = ("running", "timer", "waiting")

    def __init__(self) -> None:
        # When each of them began, the oldest first. Those that do not count any more are missing.
        self.running: dict[Turn, float] = {}
        self.waiting: deque[tuple[Turn, asyncio.Future[None]]] = deque()
        self.timer: asyncio.TimerHandle | None = None
