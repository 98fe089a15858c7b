"""The lease of one job while it is sent: until when the send may go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Lease:
    """The time until which a send may go on. All times are values of `time.monotonic`.

    The renewer calls `extend`, which moves the end of waits that are under way too.
    """

    def __init__(self, until: float) -> None:
        self._until = until
        # Whether the send has a connection. Before that it waits for other sends of this process,
        # and its lease is not renewed: the job returns to the queue when the lease ends.
        self.begun = False
        self._waits: dict[asyncio.Timeout, float] = {}
        self._watchers: set[Callable[[], None]] = set()

    @property
    def until(self) -> float:
        """The time by which the send must have stopped."""
        return self._until

    @property
    def holds(self) -> bool:
        """Whether the lease has not ended."""
        return time.monotonic() < self._until

    def extend(self, until: float) -> None:
        """Move the end. An end in the past stops the send at once."""
        earlier = until < self._until
        self._until = until
        if earlier:
            for watcher in tuple(self._watchers):
                watcher()
        for wait, limit in self._waits.items():
            if not wait.expired():
                wait.reschedule(_loop_time(min(limit, until)))

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` each time the end moves to an earlier time.

        This is for code with a timer of its own, because each `limit` sets a timer.
        """
        self._watchers.add(watcher)

    def unwatch(self, watcher: Callable[[], None]) -> None:
        """Stop calling `watcher`."""
        self._watchers.discard(watcher)

    @asynccontextmanager
    async def limit(self, seconds: float) -> AsyncIterator[None]:
        """Bound a wait by `seconds` from now and by the lease, which may move meanwhile.

        Raises:
            TimeoutError: one of them has passed.
        """
        latest = time.monotonic() + seconds
        async with asyncio.timeout_at(_loop_time(min(latest, self._until))) as wait:
            self._waits[wait] = latest
            try:
                yield
            finally:
                del self._waits[wait]


def _loop_time(moment: float) -> float:
    """Convert a value of `time.monotonic` to the event loop's clock."""
    return asyncio.get_running_loop().time() + moment - time.monotonic()
