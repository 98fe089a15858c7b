"""Joins the work of many calls, which costs nearly the same for one key as for ten.

All calls that come while a round of work is in progress share the next round. A key whose work
takes long gets rounds of its own from then on, so that it delays no other keys.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextvars import Context
from typing import Any, Final, Generic, TypeVar

import structlog
from cachetools import TTLCache

T = TypeVar("T")

# The most keys of one round. More of them share the round after the next.
_MOST_KEYS: Final = 100
# A round that takes longer than _SLOW_S and _SLOW_TIMES as long as usual may have a slow key, such
# as a sender with a million cancelled jobs. On a busy machine, all rounds take long.
_SLOW_S: Final = 0.1
_SLOW_TIMES: Final = 4
# The usual duration that is assumed before the first round, in seconds, and the weight of each
# further round in the average.
_USUAL_S: Final = 0.05
_WEIGHT: Final = 0.1
# How long the keys of a slow round get rounds of their own, and the most keys that do.
_ALONE_S: Final = 30.0
_MOST_ALONE: Final = 10_000
# The most such rounds at a time. Each holds a connection.
_MOST_ALONE_ROUNDS: Final = 3

_log = structlog.get_logger(__name__)


class Coalesced(Generic[T]):
    """Gets a value for each key, such as the id of a sender."""

    def __init__(self, work: Callable[[Sequence[int]], Awaitable[Mapping[int, T]]]) -> None:
        """`work` returns the values of keys. It must have a time limit."""
        self._work = work
        self._waiting: dict[int, asyncio.Future[T | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._shared: asyncio.Task[None] | None = None
        # The keys that are worked on alone at the moment.
        self._busy: set[int] = set()
        self._usual = _USUAL_S
        self._alone: TTLCache[int, None] = TTLCache(_MOST_ALONE, _ALONE_S, timer=time.monotonic)

    async def get(self, key: int) -> T | None:
        """Return the value by work that begins after this call; None if there is none."""
        # If this call is cancelled, others still wait for the value.
        return await asyncio.shield(self.begin(key))

    def begin(self, key: int) -> asyncio.Future[T | None]:
        """Return a future of the value, which others wait for too: do not cancel it."""
        result = self._waiting.get(key)
        if result is None:
            result = asyncio.get_running_loop().create_future()
            self._waiting[key] = result
            if key in self._alone:
                self._begin_alone()
            else:
                self._begin_shared()
        return result

    async def close(self) -> None:
        """Wait for the work in progress, which has a time limit."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # The task has an empty context, because a round belongs to many calls.
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _begin_shared(self) -> None:
        if self._shared is None:
            self._shared = self._start(self._rounds())

    def _begin_alone(self) -> None:
        """Begin rounds of keys that are alone: one for each key, and a few in all."""
        for each in list(self._waiting):
            if len(self._busy) >= _MOST_ALONE_ROUNDS:
                return
            if each in self._alone and each not in self._busy:
                self._busy.add(each)
                self._start(self._round_alone(each))

    async def _round_alone(self, key: int) -> None:
        try:
            await self._round([key])
        finally:
            self._busy.discard(key)
            if self._waiting:
                # They may include this key, which is not alone any more.
                self._begin_alone()
                self._begin_shared()

    async def _rounds(self) -> None:
        try:
            while self._waiting:
                self._begin_alone()
                some = [each for each in self._waiting if each not in self._alone]
                if not some:
                    return
                await self._round(some[:_MOST_KEYS], shared=True)
        finally:
            self._shared = None

    async def _round(self, keys: Sequence[int], *, shared: bool = False) -> None:
        # The key is removed before the work begins, because the work may miss what a later caller
        # committed.
        results = {each: self._waiting.pop(each) for each in keys if each in self._waiting}
        if not results:
            return
        began = time.monotonic()
        found: Mapping[int, T] = {}
        try:
            found = await self._work(list(results))
        except Exception:  # noqa: BLE001 - the callers get None
            _log.exception("coalesced_work_failed", keys=list(results))
        finally:
            slow = self._is_slow(time.monotonic() - began, shared=shared)
            for each, result in results.items():
                if slow:
                    self._alone[each] = None
                elif not shared:
                    self._alone.pop(each, None)
                if not result.done():
                    result.set_result(found.get(each))

    def _is_slow(self, took: float, *, shared: bool) -> bool:
        """Return whether a round took unusually long, and update the usual duration."""
        slow = took > max(_SLOW_S, _SLOW_TIMES * self._usual)
        if shared:
            self._usual += _WEIGHT * (min(took, 2 * self._usual) - self._usual)
        return slow
