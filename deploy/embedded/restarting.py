"""Starts processes again that end by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from outbox_server.deploy.child import Child, LocalServerError
from outbox_server.deploy.embedded.service import describe_end

# The pauses between restarts grow, so that a service that cannot start does not use the whole CPU.
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0


class Restartable(Protocol):
    """A server or service that can be started again."""

    @property
    def child(self) -> Child:
        """Its process."""

    async def start(self) -> None:
        """Start it, and return when it is ready."""


class Restarter:
    """Starts servers and services again while `run` runs, and reports that to `say`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._kept: dict[str, Callable[[], Restartable]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None

    def keep(self, title: str, present: Callable[[], Restartable]) -> None:
        """Start what `present` returns again whenever it ends, from now on or when `run` begins."""
        self._kept[title] = present
        if self._group is not None:
            self._tasks[title] = self._group.create_task(self._keep(title, present))

    async def forget(self, title: str) -> None:
        """Do not start it again any more."""
        del self._kept[title]
        task = self._tasks.pop(title)
        task.cancel()
        await asyncio.wait({task})

    async def run(self) -> None:
        """Restart processes until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            for title, present in self._kept.items():
                self._tasks[title] = group.create_task(self._keep(title, present))

    async def _keep(self, title: str, present: Callable[[], Restartable]) -> None:
        """Start what `present` returns again whenever it ends.

        If another server has taken its place by then, that one is kept from then on.
        """
        while True:
            kept = present()
            code = await kept.child.wait()
            if present() is not kept:
                continue
            self._say(f"{title} {describe_end(code)}; starting it again")
            if await self._start_again(kept, present):
                self._say(f"{title} is running again")

    async def _start_again(self, kept: Restartable, present: Callable[[], Restartable]) -> bool:
        pause = _FIRST_PAUSE_S
        while present() is kept:
            try:
                await kept.start()
            except LocalServerError as error:
                self._say(str(error))
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_S)
            else:
                return True
        return False
