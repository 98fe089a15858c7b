"""The loop that folds count deltas. A late fold makes readers slower, but counts stay exact."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import structlog

from outbox_server.shared.loops import Loop

# A fold takes less than 0.1 s. If it takes this long it hangs, as when the server has vanished.
_LIMIT: Final = timedelta(seconds=30)
_NO_PAUSE: Final = timedelta(0)


@dataclass(frozen=True, slots=True)
class Pauses:
    """How long the loop waits after a fold, depending on its result."""

    # The pause after deltas were folded, because more will follow.
    busy: timedelta = timedelta(seconds=1)
    # If there are no deltas, each pause doubles, up to this.
    idle: timedelta = timedelta(seconds=5)
    # If folding fails, each pause doubles, up to this.
    failing: timedelta = timedelta(seconds=10)


async def fold_until_stopped(
    fold: Callable[[], Awaitable[int]],
    stop: asyncio.Event,
    pauses: Pauses | None = None,
    expected: tuple[type[Exception], ...] = (),
) -> None:
    """Fold until `stop` is set. `fold` folds some deltas and returns how many, 0 if none are left.

    After an error, which is logged, folding is tried again. Those in `expected` are logged without
    their stack trace.
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

    # No error ends the loop, because counts stay exact without folding.
    loop = Loop(
        "folding",
        fold_some,
        errors=(Exception,),
        retry=pauses.busy,
        longest_retry=pauses.failing,
        trace=True,
        expected=(TimeoutError, *expected),
    )
    await loop.run(stop)
