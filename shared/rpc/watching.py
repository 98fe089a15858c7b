"""Streams rows of the database to watching callers: their state first, then each change.

One statement reads the watched keys of all watchers of a process, a few times a second, and only
while somebody watches. So the cost depends on what is watched, not on the size of the tables.
NOTIFY is not used, because every commit of a dispatcher would take one lock of the whole server.
Nor is a log of changes: some counts change without one (a claim writes none).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, Generic, TypeVar

from outbox_server.shared.callers import current_claimant, next_part
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.fair_shares import Claimant
from outbox_server.shared.loops import Loop

T = TypeVar("T")

# The time between two reads: a change is seen within this and the duration of the statement.
PAUSE: Final = timedelta(milliseconds=250)
# How many watches of one user are read at a time, so that other users' watches are not late. A user
# with more watches sees changes later.
USER_READ: Final = 50


@dataclass(eq=False, slots=True)
class _Watcher(Generic[T]):
    key: int
    owner: Claimant
    # Only the newest state: a slow reader misses the states in between, so none pile up.
    found: T | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Watch(Generic[T]):
    """The watchers of one process; `read` returns the current states of keys."""

    def __init__(
        self,
        read: Callable[[Collection[int]], Awaitable[Mapping[int, T]]],
        pause: timedelta = PAUSE,
    ) -> None:
        self._read = read
        self._pause = pause
        # An ordered set: the keys are in the order in which they will be read.
        self._watchers: dict[_Watcher[T], None] = {}
        self._loop = Loop("watching", self._look, errors=DATABASE_ERRORS)

    async def run(self, stop: asyncio.Event) -> None:
        """Read while somebody watches, until `stop`. Run it outside of calls, which all use it."""
        await self._loop.run(stop)

    async def _look(self) -> timedelta | None:
        if not self._watchers:
            return None
        keys = self._next_keys()
        found = await self._read(keys)
        for watcher in list(self._watchers):
            now = found.get(watcher.key)
            if now is not None and now != watcher.found:
                watcher.found = now
                watcher.changed.set()
        return self._pause

    def _next_keys(self) -> set[int]:
        """Return the keys to read now: of each user at most USER_READ, in turns."""
        read: list[_Watcher[T]] = []
        counts: Counter[Claimant] = Counter()
        for watcher in self._watchers:
            if counts[watcher.owner] < USER_READ or watcher.owner.privileged:
                counts[watcher.owner] += 1
                read.append(watcher)
        if len(read) < len(self._watchers):
            for watcher in read:
                del self._watchers[watcher]
                self._watchers[watcher] = None
        return {watcher.key for watcher in read}

    async def follow(self, key: int) -> AsyncGenerator[T, None]:
        """Yield the state of `key` at once, then after each change; never ends by itself.

        The caller must have checked that `key` may be seen.
        """
        watcher = _Watcher[T](key, current_claimant())
        self._watchers[watcher] = None
        self._loop.wake()
        try:
            while True:
                await watcher.changed.wait()
                # All watchers of a key are woken at once.
                await next_part()
                watcher.changed.clear()
                if watcher.found is not None:
                    yield watcher.found
        finally:
            self._watchers.pop(watcher, None)
