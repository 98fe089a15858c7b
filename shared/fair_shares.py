"""Shares a number of places fairly between the users who want them.

One user alone may hold all places but a reserve. The more users hold places, the smaller is the
share of each: a user may take one more place only while it holds less than a fixed multiple of the
free places. So a user who comes later always finds a free place, and nobody's place is taken away.
(Choudhury and Hahne describe this rule as "dynamic queue length thresholds".)

Taking a free place takes constant time. The time to return one grows with the number of users who
wait. Nothing is stored about a user who neither holds a place nor waits.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from outbox_server.shared.errors import ResourceExhausted

# Shorter than the usual deadline of a call, so that the caller gets the reason and RetryInfo.
PATIENCE: Final = timedelta(seconds=10)
_RETRY_AFTER: Final = timedelta(seconds=2)
# A user alone leaves one place in four free. One place in sixteen is reserved for operators.
_RESERVE: Final = 4
_OPERATORS: Final = 16
# With fewer places than this, none is reserved for operators. Operators are always first in line.
_FEW: Final = 8
_MAX_NAME: Final = 128


@dataclass(frozen=True, slots=True)
class Claimant:
    """The owner of a share: a user, or a key that acts for many users."""

    name: str
    kind: str = "user"
    # An operator, or the only caller of a server without authentication. May hold every place.
    privileged: bool = False

    def __str__(self) -> str:
        """Return the name for messages."""
        return f"{self.kind} {self.name[:_MAX_NAME]}".rstrip()


# The claimant of work that belongs to no call.
NOBODY: Final = Claimant("", "server", privileged=True)


class FairShares:
    """A number of places that users share; `what` names them, such as `calls`."""

    def __init__(
        self,
        what: str,
        capacity: int,
        *,
        waiting: int = 0,
        patience: timedelta = PATIENCE,
        reserve: int | None = None,
        operators: int | None = None,
    ) -> None:
        """Share `capacity` places. Up to `waiting` calls wait in line, each for `patience`.

        `operators` places are reserved for privileged claimants (default: one in 16). A user alone
        leaves at least `reserve` of the other places free (default: one in 4). The waiting line is
        shared by the same rule. Privileged claimants have a line of their own, equally long.
        """
        self.what = what
        self._capacity = capacity
        if operators is None:
            operators = capacity // _OPERATORS or int(capacity >= _FEW)
        self._places = _Places(capacity - operators, reserve)
        self._line = _Places(waiting, None)
        self._patience = patience.total_seconds()
        self._held: Counter[Claimant] = Counter()
        self._total = 0
        self._waiters: dict[Claimant, deque[asyncio.Future[None]]] = {}

    def held_by(self, claimant: Claimant) -> int:
        """Return how many places a claimant holds."""
        return self._held[claimant]

    @property
    def in_use(self) -> int:
        """How many places are held."""
        return self._total

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiters.values()))

    def try_take(self, claimant: Claimant) -> bool:
        """Take a place if the claimant may have one more now. Return whether it did."""
        if claimant in self._waiters or not self._admits(claimant):
            return False
        self._take(claimant)
        return True

    def give_back(self, claimant: Claimant) -> None:
        """Return a place, and give it to the waiting claimant that holds the fewest."""
        self._total -= 1
        self._held[claimant] -= 1
        if not claimant.privileged:
            self._places.taken -= 1
        if not self._held[claimant]:
            del self._held[claimant]
        self._serve_line()

    async def take(self, claimant: Claimant) -> None:
        """Take a place, and wait for it if necessary.

        Raises:
            ResourceExhausted: TOO_MANY_CALLS: too many wait, or this one waited too long. The
                metadata say whose limit was reached.
        """
        if not self.try_take(claimant):
            await self._wait(claimant)

    @asynccontextmanager
    async def entered(self, claimant: Claimant) -> AsyncIterator[HeldPlace]:
        """Hold a place until the end of the block, or until it is left. Raises as `take` does."""
        await self.take(claimant)
        place = HeldPlace(self, claimant)
        try:
            yield place
        finally:
            place.leave()

    def _admits(self, claimant: Claimant) -> bool:
        free = self._capacity - self._total
        if claimant.privileged:
            return free > 0
        return self._places.admit(self._held[claimant], free)

    def _take(self, claimant: Claimant) -> None:
        self._total += 1
        self._held[claimant] += 1
        if not claimant.privileged:
            self._places.taken += 1

    async def _wait(self, claimant: Claimant) -> None:
        own = self._waiters.get(claimant, ())
        if claimant.privileged:
            room = len(own) < self._line.capacity
        else:
            room = self._line.admit(len(own), self._line.capacity)
        if not room:
            waiting = len(own) if own else self.waiting
            # A claimant that does not wait yet would get a place in the line, so the limit is the
            # share of the line.
            has_line = self._line.capacity > 0
            own_share = self._line.admit(0, self._line.capacity) if has_line else None
            raise self._refusal(claimant, f"and {waiting} wait", own_share=own_share)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(claimant, deque()).append(future)
        self._line.taken += not claimant.privileged
        try:
            async with asyncio.timeout(self._patience):
                await future
        except TimeoutError:
            self._leave(claimant, future)
            raise self._refusal(
                claimant, f"and none became free within {self._patience:g} s"
            ) from None
        except asyncio.CancelledError:
            self._leave(claimant, future)
            raise

    def _leave(self, claimant: Claimant, future: asyncio.Future[None]) -> None:
        """Give up waiting. The place may have been given at the same moment: return it."""
        if future.done() and not future.cancelled():
            self.give_back(claimant)
            return
        line = self._waiters.get(claimant)
        if line is not None and future in line:  # unless `_serve_line` has removed it
            line.remove(future)
            self._left_line(claimant)

    def _left_line(self, claimant: Claimant) -> None:
        self._line.taken -= not claimant.privileged
        if not self._waiters[claimant]:
            del self._waiters[claimant]

    def _serve_line(self) -> None:
        while self._waiters and self._total < self._capacity:
            able = [each for each in self._waiters if self._admits(each)]
            if not able:
                return
            chosen = min(able, key=lambda each: (not each.privileged, self._held[each]))
            line = self._waiters.pop(chosen)
            future = line.popleft()
            # Move it to the end, so that users with equally many places take turns.
            self._waiters[chosen] = line
            self._left_line(chosen)
            # A wait that was cancelled, and whose task has not run since, counts as ended.
            if not future.done():
                self._take(chosen)
                future.set_result(None)

    def _refusal(
        self, claimant: Claimant, why: str, *, own_share: bool | None = None
    ) -> ResourceExhausted:
        """Return the refusal. `own_share`: whether the limit is the claimant's own share.

        None means that the places decide it, and not the waiting line.
        """
        if own_share is None:
            # A claimant without places would get one, so the limit is this claimant's own share.
            own_share = self._places.admit(0, self._capacity - self._total)
        own = own_share and not claimant.privileged
        current = self._held[claimant] if own else self._total
        if own:
            whom = f"the {claimant} has reached its share of the {self.what} of this server"
        else:
            whom = f"all {self.what} of this server are taken"
        return ResourceExhausted(
            f"{whom}: {current} {self.what} are in progress {why}; try again later",
            reason="TOO_MANY_CALLS",
            metadata={
                "what": self.what,
                "limit_of": str(claimant) if own else "server",
                "current": str(current),
                "at_once": str(self._capacity),
            },
            retry_after=_RETRY_AFTER,
        )


class HeldPlace:
    """A place that is given back once: at the end of a block, or before."""

    def __init__(self, shares: FairShares, claimant: Claimant) -> None:
        self._shares = shares
        self._claimant = claimant
        self._held = True

    def leave(self) -> None:
        """Give the place back, unless that was done."""
        if self._held:
            self._held = False
            self._shares.give_back(self._claimant)


class _Places:
    """The rule of a fair share. It applies to the places and to the waiting line."""

    def __init__(self, capacity: int, reserve: int | None) -> None:
        self.capacity = capacity
        if reserve is None:
            reserve = max(capacity // _RESERVE, int(capacity > 1))
        self._reserve = reserve
        self.taken = 0

    @property
    def free(self) -> int:
        return self.capacity - self.taken

    def admit(self, held: int, free: int) -> bool:
        """Return whether a claimant that holds `held` may take one more, with `free` left."""
        free = min(free, self.free)
        if held and free == 1 and self._reserve:
            return False  # the last place is kept for a user who has none
        return free > 0 and held * self._reserve < (self.capacity - self._reserve) * free
