"""Limits the calls at once: some run, some wait for a limited time, all others are refused.

A refused call costs almost nothing, so a flood of calls cannot exceed the memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

from outbox_server.shared.errors import ResourceExhausted

# Shorter than the usual deadline of a call, so that the caller gets the reason and RetryInfo.
PATIENCE: Final = timedelta(seconds=10)
_RETRY_AFTER: Final = timedelta(seconds=2)


class Gate:
    """A bound on the number of calls at once, first come, first served; `what` names them."""

    def __init__(
        self, what: str, *, at_once: int, waiting: int, patience: timedelta = PATIENCE
    ) -> None:
        """Let `at_once` calls run; `waiting` more may wait, each for `patience`."""
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
            ResourceExhausted: TOO_MANY_CALLS: too many calls wait, or this one waited too long.
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
            raise self._refusal(f"and {self._waiting} are waiting")
        self._waiting += 1
        try:
            async with asyncio.timeout(self._patience):
                await self._places.acquire()
        except TimeoutError:
            raise self._refusal(f"and none ended within {self._patience:g} s") from None
        finally:
            self._waiting -= 1

    def _refusal(self, why: str) -> ResourceExhausted:
        return ResourceExhausted(
            f"{self._at_once} {self._what} are in progress {why}; try again later",
            reason="TOO_MANY_CALLS",
            metadata={"at_once": str(self._at_once)},
            retry_after=_RETRY_AFTER,
        )
