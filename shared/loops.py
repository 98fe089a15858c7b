"""Background loops: do some work, then pause until the next step, a wake-up or the end.

A loop ends in one of two ways. When its `stop` event is set, it finishes the step that is running.
When its task is cancelled, it ends at once; `run_until_stopped` does this at a `stop` event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from datetime import timedelta
from typing import Any

import structlog

_log = structlog.get_logger("outbox.loops")


class Loop:
    """Repeats an asynchronous step. The step returns the pause after it; None waits for `wake`.

    After an error in `errors` the step is tried again. The pause before that is `retry` and doubles
    with each failure in a row up to `longest_retry` (default: no growth). The first failure in a
    row is logged under `name`, with its trace if `trace` is set and it is not one of `expected`.
    Any other error ends the loop.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], Awaitable[timedelta | None]],
        *,
        errors: tuple[type[Exception], ...] = (),
        retry: timedelta = timedelta(seconds=1),
        longest_retry: timedelta | None = None,
        trace: bool = False,
        expected: tuple[type[Exception], ...] = (),
    ) -> None:
        self._name = name
        self._step = step
        self._errors = errors
        self._retry = retry
        self._longest_retry = longest_retry or retry
        self._trace = trace
        self._expected = expected
        self._failures = 0
        self._next_retry = retry
        self._stop = asyncio.Event()
        self._woken = asyncio.Event()

    @property
    def stopping(self) -> bool:
        """Whether the loop was told to stop. A long step returns early then."""
        return self._stop.is_set()

    def wake(self) -> None:
        """End the pause. During a step, skip the pause after it."""
        self._woken.set()

    async def run(self, stop: asyncio.Event | None = None) -> None:
        """Repeat the step until `stop` is set. Without `stop`, repeat it until cancelled."""
        self._stop = stop or self._stop
        stopping = asyncio.create_task(self._wake_at_stop())
        try:
            while not self.stopping:
                self._woken.clear()
                pause = await self._try()
                raise_if_cancelled()
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if pause is None else pause.total_seconds()):
                        await self._woken.wait()
        finally:
            stopping.cancel()

    async def _wake_at_stop(self) -> None:
        await self._stop.wait()
        self._woken.set()

    async def _try(self) -> timedelta | None:
        try:
            pause = await self._step()
        except self._errors as error:
            return self._failed(error)
        if self._failures:
            _log.info(f"{self._name} works again", failures=self._failures)
            self._failures = 0
            self._next_retry = self._retry
        return pause

    def _failed(self, error: Exception) -> timedelta:
        self._failures += 1
        # Logged once per outage, because the next steps most likely fail for the same reason.
        if self._failures == 1:
            trace = error if self._trace and not isinstance(error, self._expected) else None
            _log.warning(f"{self._name} failed", error=type(error).__name__, exc_info=trace)
        pause = self._next_retry
        self._next_retry = min(pause * 2, self._longest_retry)
        return pause


async def run_until_stopped(
    work: Callable[[], Coroutine[Any, Any, None]], stop: asyncio.Event
) -> None:
    """Run work that never ends by itself, and cancel it when `stop` is set."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(work())
        await stop.wait()
        task.cancel()


def raise_if_cancelled() -> None:
    """Raise CancelledError if the running task was cancelled and the cancellation was lost.

    On Python 3.11, `asyncio.wait_for` loses a cancellation that arrives together with its result,
    and redis-py writes by `wait_for`. A loop that continued would never end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def as_coroutine(part: Callable[[], Awaitable[object]]) -> None:
    """Await the result of `part`. Tasks need a coroutine, and `part` may return any awaitable."""
    await part()
