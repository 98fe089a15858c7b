"""The loop that folds count deltas. Only speed depends on it: reads add up what is not folded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import structlog

from outbox_server.shared.loops import Loop

# A fold takes less than 0.1 s; one that takes this long hangs, as on a server that vanished.
_LIMIT: Final = timedelta(seconds=30)
_NO_PAUSE: Final = timedelta(0)


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
    total = 0

    async def fold_some() -> timedelta:
        nonlocal pause, total
        async with asyncio.timeout(_LIMIT.total_seconds()):
            folded = await fold()
        total += folded
        if folded:
            return _NO_PAUSE
        if total:
            log.debug("folded", deltas=total)
        pause = pauses.busy if total else min(pause * 2, pauses.idle)
        total = 0
        return pause

    # Any error: counts stay exact without folding.
    loop = Loop(
        "folding",
        fold_some,
        errors=(Exception,),
        retry=pauses.busy,
        longest_retry=pauses.failing,
        trace=True,
    )
    await loop.run(stop)
