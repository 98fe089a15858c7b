"""Lets so many through at a time, so many wait for so long, and refuses the rest.

What is refused has cost next to nothing: memory and waiting have a bound that a flood cannot move.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

from outbox_server.shared.errors import ResourceExhausted

# Below the deadline that a call usually has: the caller hears why, and when to come again.
PATIENCE: Final = timedelta(seconds=10)
_RETRY_AFTER: Final = timedelta(seconds=2)


class Gate:
    """A bound on how many do `what` at once; first come, first served."""

    def __init__(
        self, what: str, *, at_once: int, waiting: int, patience: timedelta = PATIENCE
    ) -> None:
        """Let `at_once` through; `waiting` more may wait, each for `patience`."""
        self._what = what
        self._at_once = at_once
        self._places = asyncio.Semaphore(at_once)
        self._line = waiting
        self._waiting = 0
        self._patience = patience.total_seconds()

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        """Hold a place, from when one is free until the end of the block.

        Raises:
            ResourceExhausted: TOO_MANY_CALLS: too many wait, or it waited for too long.
        """
        if self._places.locked():
            await self._wait()
        else:
            await self._places.acquire()  # at once
        try:
            yield
        finally:
            self._places.release()

    async def _wait(self) -> None:
        if self._waiting >= self._line:
            raise self._refusal(f"and {self._waiting} wait")
        self._waiting += 1
        try:
            async with asyncio.timeout(self._patience):
                await self._places.acquire()
        except TimeoutError:
            raise self._refusal(f"and none has ended for {self._patience:g} s") from None
        finally:
            self._waiting -= 1

    def _refusal(self, why: str) -> ResourceExhausted:
        return ResourceExhausted(
            f"{self._at_once} {self._what} are under way, {why}; try again a little later",
            reason="TOO_MANY_CALLS",
            metadata={"at_once": str(self._at_once)},
            retry_after=_RETRY_AFTER,
        )
