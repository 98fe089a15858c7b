"""Follows things of the database for callers: their state first, then each change.

One statement by their keys a few times a second, for all watchers of a process at once, and none
while nobody watches: it costs what is watched, never what there is. No NOTIFY, which would make
every commit of a dispatcher take one lock of the whole server; and no log of changes either: counts
move without one (a claim writes none), and are folded away.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, Generic, TypeVar

import structlog

from shared.database import DATABASE_ERRORS

T = TypeVar("T")

# Between two looks, so a change is seen within this and the time of the statement.
PAUSE: Final = timedelta(milliseconds=250)
_AFTER_ERROR: Final = timedelta(seconds=1)
_log = structlog.get_logger("outbox.watching")


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
        self._woken = asyncio.Event()
        self._stopped = False

    async def run(self, stop: asyncio.Event) -> None:
        """Look, while somebody watches, until `stop`. Outside of calls: it is nobody's own."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._stop_at(stop))
            group.create_task(self._run())

    async def _stop_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._stopped = True
        self._woken.set()

    async def _run(self) -> None:
        while not self._stopped:
            self._woken.clear()
            pause: float | None = None
            if self._watchers:
                try:
                    await self._look()
                    pause = self._pause.total_seconds()
                except DATABASE_ERRORS as error:
                    _log.warning("watching failed", error=type(error).__name__)
                    pause = _AFTER_ERROR.total_seconds()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._woken.wait()

    async def _look(self) -> None:
        keys = {watcher.key for watcher in self._watchers}
        found = await self._read(keys)
        for watcher in self._watchers:
            now = found.get(watcher.key)
            if now is not None and now != watcher.found:
                watcher.found = now
                watcher.changed.set()

    async def follow(self, key: int) -> AsyncGenerator[T, None]:
        """Yield what is under `key` at once, then whenever it has changed; never ends by itself.

        Whether the caller may see it must be known already.
        """
        watcher = _Watcher[T](key)
        self._watchers.add(watcher)
        self._woken.set()
        try:
            while True:
                await watcher.changed.wait()
                watcher.changed.clear()
                if watcher.found is not None:
                    yield watcher.found
        finally:
            self._watchers.discard(watcher)
