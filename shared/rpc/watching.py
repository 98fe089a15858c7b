"""Follows things of the database for callers: their state first, then each change.

One statement by their keys a few times a second, for all watchers of a process at once, and none
while nobody watches: it costs what is watched, never what there is. No NOTIFY, which would make
every commit of a dispatcher take one lock of the whole server; and no log of changes either: counts
move without one (a claim writes none), and are folded away.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, Generic, TypeVar

from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.loops import Loop

T = TypeVar("T")

# Between two looks, so a change is seen within this and the time of the statement.
PAUSE: Final = timedelta(milliseconds=250)


@dataclass(eq=False, slots=True)
class _Watcher(Generic[T]):
    key: int
    # Of the newest only: whoever reads slowly misses what was in between, and nothing piles up.
    found: T | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Watch(Generic[T]):
    """What is watched in one process; `read` returns what there is by key, as it is now."""

    def __init__(
        self,
        read: Callable[[Collection[int]], Awaitable[Mapping[int, T]]],
        pause: timedelta = PAUSE,
    ) -> None:
        self._read = read
        self._pause = pause
        self._watchers: set[_Watcher[T]] = set()
        self._loop = Loop("watching", self._look, errors=DATABASE_ERRORS)

    async def run(self, stop: asyncio.Event) -> None:
        """Look, while somebody watches, until `stop`. Outside of calls: it is nobody's own."""
        await self._loop.run(stop)

    async def _look(self) -> timedelta | None:
        if not self._watchers:
            return None
        keys = {watcher.key for watcher in self._watchers}
        found = await self._read(keys)
        for watcher in self._watchers:
            now = found.get(watcher.key)
            if now is not None and now != watcher.found:
                watcher.found = now
                watcher.changed.set()
        return self._pause

    async def follow(self, key: int) -> AsyncGenerator[T, None]:
        """Yield what is under `key` at once, then whenever it has changed; never ends by itself.

        Whether the caller may see it must be known already.
        """
        watcher = _Watcher[T](key)
        self._watchers.add(watcher)
        self._loop.wake()
        try:
            while True:
                await watcher.changed.wait()
                watcher.changed.clear()
                if watcher.found is not None:
                    yield watcher.found
        finally:
            self._watchers.discard(watcher)
