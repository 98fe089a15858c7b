"""Wakes a waiting dispatcher when a job becomes due earlier than expected."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from redis.asyncio import Redis

from outbox_server.shared.loops import Loop, raise_if_cancelled
from outbox_server.shared.queue.connection import QUEUE_ERRORS

_RETRY = timedelta(milliseconds=500)
# How often it checks whether the claims go to another server now.
_CHECK_S = 2.0


class WakeListener:
    """Listens on a shard's channel. A missed message delays a claim by at most a heartbeat."""

    def __init__(
        self, redis: Redis, channel: str, departures: Callable[[], int] = lambda: 0
    ) -> None:
        """`departures` counts how often the claims have left their server: it leaves it then."""
        self._redis = redis
        self._channel = channel
        self._departures = departures
        self._event = asyncio.Event()
        self._heard = True

    @property
    def heard(self) -> bool:
        """Whether a message has come, or a wait was over, since the last `clear`."""
        return self._heard

    def clear(self) -> None:
        """Forget earlier wake-ups. Called before each claim."""
        self._event.clear()
        self._heard = False

    def _hear(self) -> None:
        self._heard = True
        self._event.set()

    def wake(self) -> None:
        """Wake the dispatcher from within the process."""
        self._event.set()

    async def wait(self, limit: timedelta) -> None:
        """Wait for the next wake-up, but no longer than `limit`."""
        # Without a task of its own, unlike `asyncio.wait_for`: each group of mails waits here.
        timer = asyncio.get_running_loop().call_later(limit.total_seconds(), self._hear)
        try:
            await self._event.wait()
        finally:
            timer.cancel()

    async def run(self) -> None:
        """Listen until cancelled. After a lost connection, connect again."""
        await Loop("listening", self._listen).run()

    async def _listen(self) -> timedelta:
        with suppress(*QUEUE_ERRORS):
            async with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                await pubsub.subscribe(self._channel)
                # Messages may have been missed before the subscription, so wake once.
                self._hear()
                before = self._departures()
                while self._departures() == before:
                    if await pubsub.get_message(timeout=_CHECK_S):
                        self._hear()
                    raise_if_cancelled()
        return _RETRY
