"""Joins the work of many calls, which costs nearly the same for one key as for ten.

All calls that come while a round of work is in progress share the next round. A key whose work
takes long gets rounds of its own from then on, so that it delays no other keys. The keys of users
with many of them have rounds of their own, too, at the same time as those of all others.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextvars import Context
from typing import Any, Final, Generic, TypeVar

import structlog
from cachetools import TTLCache

from outbox_server.shared.fair_shares import NOBODY, Claimant

T = TypeVar("T")

# The maximum number of keys of one round. More of them share the round after the next.
_MOST_KEYS: Final = 100
# A user with more keys that wait than this has many. The second number is the most keys of a round
# of such users.
_FEW: Final = 4
_MOST_OF_MANY: Final = 16
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
# The maximum number of such rounds at a time. Each holds a connection.
_MOST_ALONE_ROUNDS: Final = 3

_log = structlog.get_logger(__name__)


class Coalesced(Generic[T]):
    """Gets a value for each key, such as the id of a sender."""

    def __init__(self, work: Callable[[Sequence[int]], Awaitable[Mapping[int, T]]]) -> None:
        """`work` returns the values of keys. It must have a time limit."""
        self._work = work
        self._waiting: dict[int, asyncio.Future[T | None]] = {}
        # The user of each key that waits, and how many keys each of them has.
        self._owners: dict[int, Claimant] = {}
        self._counts: Counter[Claimant] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        # Whether rounds of users with many keys are in progress (True), and those of all others.
        self._shared: dict[bool, asyncio.Task[None]] = {}
        # The keys that are worked on alone at the moment.
        self._busy: set[int] = set()
        self._usual = _USUAL_S
        self._alone: TTLCache[int, None] = TTLCache(_MOST_ALONE, _ALONE_S, timer=time.monotonic)

    async def get(self, key: int, owner: Claimant = NOBODY) -> T | None:
        """Return the value by work that begins after this call; None if there is none."""
        # If this call is cancelled, others still wait for the value.
        return await asyncio.shield(self.begin(key, owner))

    def begin(self, key: int, owner: Claimant = NOBODY) -> asyncio.Future[T | None]:
        """Return a future of the value, which others wait for too: do not cancel it.

        `owner` is the user that the key belongs to; NOBODY never has too many.
        """
        result = self._waiting.get(key)
        if result is None:
            result = asyncio.get_running_loop().create_future()
            self._waiting[key] = result
            self._owners[key] = owner
            self._counts[owner] += 1
            if key in self._alone:
                self._begin_alone()
            else:
                self._begin_rounds(many=self._has_many(owner))
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

    def _begin_rounds(self, *, many: bool) -> None:
        if many not in self._shared:
            self._shared[many] = self._start(self._rounds(many=many))

    def _begin_shared(self) -> None:
        for many in (False, True):
            if self._next_keys(many=many):
                self._begin_rounds(many=many)

    def _has_many(self, owner: Claimant) -> bool:
        return owner is not NOBODY and self._counts[owner] > _FEW

    def _next_keys(self, *, many: bool) -> list[int]:
        """Return the keys of the next round of users with many keys, or of all others."""
        some = [
            each
            for each in self._waiting
            if each not in self._alone and self._has_many(self._owners[each]) == many
        ]
        return some[: _MOST_OF_MANY if many else _MOST_KEYS]

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

    async def _rounds(self, *, many: bool) -> None:
        try:
            while self._waiting:
                self._begin_alone()
                some = self._next_keys(many=many)
                if not some:
                    return
                await self._round(some, shared=True)
        finally:
            del self._shared[many]
            # A user who had many keys may have few now.
            self._begin_shared()

    async def _round(self, keys: Sequence[int], *, shared: bool = False) -> None:
        # The key is removed before the work begins, because the work may miss what a later caller
        # committed.
        results = {each: self._waiting.pop(each) for each in keys if each in self._waiting}
        if not results:
            return
        for each in results:
            owner = self._owners.pop(each)
            self._counts[owner] -= 1
            if not self._counts[owner]:
                del self._counts[owner]
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
