"""The loop that folds count deltas. Only speed depends on it: reads add up what is not folded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import structlog

# A fold takes less than 0.1 s; one that takes this long hangs, as on a server that vanished.
_LIMIT: Final = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class Pauses:
    """How long the loop waits, by what it found."""

    # After deltas were folded: there will be more.
    busy: timedelta = timedelta(seconds=1)
    # Where there are none, each pause is twice the one before, up to this.
    idle: timedelta = timedelta(seconds=5)
    # While folding fails, likewise.
    failing: timedelta = timedelta(seconds=10)


async def fold_until_stopped(
    fold: Callable[[], Awaitable[int]], stop: asyncio.Event, pauses: Pauses | None = None
) -> None:
    """Fold until `stop` is set; `fold` folds some deltas and returns how many, 0 if none are left.

    An error is logged and tried again: PostgreSQL may be away for a while.
    """
    pauses = pauses or Pauses()
    log = structlog.get_logger("outbox.folding")
    pause = pauses.busy
    failures = 0
    while not stop.is_set():
        try:
            folded = await _fold_all(fold, stop)
        except Exception as error:  # whatever it is: counts stay exact without folding
            failures += 1
            # The trace once an outage: the next tries will most likely fail for the same reason.
            log.warning(
                "folding failed",
                error=type(error).__name__,
                failures=failures,
                exc_info=error if failures == 1 else None,
            )
            pause = min(pause * 2, pauses.failing) if failures > 1 else pauses.busy
        else:
            if failures:
                log.info("folding works again", failures=failures)
                failures = 0
            if folded:
                log.debug("folded", deltas=folded)
            pause = pauses.busy if folded else min(pause * 2, pauses.idle)
        await _wait(stop, pause)


async def _fold_all(fold: Callable[[], Awaitable[int]], stop: asyncio.Event) -> int:
    total = 0
    while not stop.is_set():
        async with asyncio.timeout(_LIMIT.total_seconds()):
            folded = await fold()
        if not folded:
            break
        total += folded
    return total


async def _wait(stop: asyncio.Event, pause: timedelta) -> None:
    try:
        async with asyncio.timeout(pause.total_seconds()):
            await stop.wait()
    except TimeoutError:
        return
