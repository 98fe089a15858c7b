"""Loads all concerned senders of a shard that Redis has lost, those first that are due."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.shared.heads.concerned import (
    ConcernedSender,
    Walk,
    find_lost,
    in_order_of_due_time,
)
from outbox_server.shared.queue.queue import Queue

# Senders that are read at once, 20 us each. The first read is small, because nothing is loaded
# before it, and a read must not take long, because the lock of a rebuild lasts 10 s.
_FIRST_READ: Final = 500
_LONGEST_READ: Final = 10_000
_READ_TIME_S: Final = 0.5
# Senders that are due within this time are loaded together with those that are due.
_SOON: Final = timedelta(seconds=5)
# The maximum number of senders, 200 bytes each, that wait in memory until those that are due are
# loaded.
_MOST_LATER: Final = 100_000
# The number of loads at a time: while one waits for PostgreSQL or Redis, another uses the
# processor.
_LOADS: Final = 2


class Rebuild:
    """One rebuild of one shard, under the lock `token`."""

    def __init__(
        self,
        engine: AsyncEngine,
        queue: Queue,
        walk: Walk,
        token: str,
        *,
        chunk: int,
        load: Callable[[Sequence[int]], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._queue = queue
        self._walk = walk
        self._token = token
        self._chunk = chunk
        self._load = load
        self.loaded = 0
        # Whether Redis or the lock was lost meanwhile. Then the rebuild has ended.
        self.overtaken = False

    async def run(self) -> None:
        """Load all senders that are lost. `overtaken` then tells whether it ended too early."""
        start: int | None = 0
        while start is not None and not self.overtaken:
            start = await self._go_through(start)

    async def _go_through(self, after: int) -> int | None:
        """Load the lost senders after an id. Return where to begin again; None: all are loaded."""
        later: list[ConcernedSender] = []
        again: int | None = None
        most = _FIRST_READ
        while not self.overtaken:
            began = time.monotonic()
            async with self._engine.connect() as connection:
                senders = await self._walk.read(
                    connection, after=after, most=most, soon_ms=_SOON // timedelta(milliseconds=1)
                )
            quick = time.monotonic() - began < _READ_TIME_S
            await self._load_lost(one for one in senders if one.soon)
            rest = [one for one in senders if not one.soon]
            if not later or len(later) + len(rest) <= _MOST_LATER:
                later += rest
            elif again is None:
                # There are too many to keep: they are read again after the others are loaded.
                again = after
            if len(senders) < most:
                break
            after = senders[-1].sender_id
            most = min(_LONGEST_READ, 2 * most) if quick else max(_FIRST_READ, most // 2)
        await self._load_lost(later)
        return again

    async def _load_lost(self, senders: Iterable[ConcernedSender]) -> None:
        """Load those of these senders that are lost, in the order in which they are due."""
        ordered = in_order_of_due_time(senders)
        parts = iter([ordered[i : i + self._chunk] for i in range(0, len(ordered), self._chunk)])
        loads = [asyncio.create_task(self._load_parts(parts)) for _ in range(_LOADS)]
        try:
            await asyncio.gather(*loads)
        finally:
            for task in loads:
                task.cancel()
            await asyncio.gather(*loads, return_exceptions=True)
        await self._keep()

    async def _load_parts(self, parts: Iterator[Sequence[ConcernedSender]]) -> None:
        for part in parts:
            if lost := await find_lost(self._queue, part):
                await self._load(lost)
                self.loaded += len(lost)
            await self._keep()
            if self.overtaken:
                return

    async def _keep(self) -> None:
        if not self.overtaken and not await self._queue.keep_rebuild(self._token):
            self.overtaken = True
