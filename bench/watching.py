"""Watches a queue being emptied: mails per second, and processor time per mail of each process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Final

from bench.bench import Bench
from bench.processor_time import processor_seconds

# Attempts of ours that ended well.
SENT: Final = "SELECT count(*) FROM attempts WHERE outcome = 1"
# A queue that sends nothing for this time has failed.
_PATIENCE_S: Final = 180.0
_FIRST: Final = 0.1
_LAST: Final = 0.9


async def watch(
    bench: Bench,
    database_url: str,
    query: str,
    total: int,
    pids: Mapping[str, int],
    *,
    first: float = _FIRST,
    last: float = _LAST,
) -> dict[str, float]:
    """Wait until `query` counts `total` mails; return what those in the middle needed.

    The mails before the fraction `first` and after `last` are left out: the start of the processes
    and the end, when not all connections are busy. Counting costs PostgreSQL a few us per mail,
    which are in its figure for all contenders.
    """
    began: tuple[float, int, dict[str, float]] | None = None
    ended: tuple[float, int, dict[str, float]] | None = None
    moved, count = time.monotonic(), 0
    async with bench.connected(database_url) as connection:
        while True:
            row = await (await connection.execute(query.encode())).fetchone()
            now, before, count = time.monotonic(), count, int(row[0]) if row else 0
            if count >= total:
                break
            if began is None and count >= first * total:
                began = now, count, processor_seconds(pids)
            elif began is not None and ended is None and count >= last * total:
                ended = now, count, processor_seconds(pids)
            if count > before:
                moved = now
            elif now - moved > _PATIENCE_S:
                raise RuntimeError(f"{count} of {total} mails were sent, and then none for minutes")
            await asyncio.sleep(_pause(now, count, began, last * total))
        if count > total:
            raise RuntimeError(f"{count} mails were sent instead of {total}")
        ended = ended or (time.monotonic(), count, processor_seconds(pids))
    if began is None:
        raise RuntimeError(f"{total} mails are too few to measure")
    seconds, mails = ended[0] - began[0], ended[1] - began[1]
    figures = {"mails_per_s": mails / seconds}
    for name in pids:
        figures[f"{name}_us"] = (ended[2][name] - began[2][name]) / mails * 1e6
    figures["sum_us"] = sum(figures[f"{name}_us"] for name in pids)
    return figures


def _pause(
    now: float, count: int, began: tuple[float, int, dict[str, float]] | None, until: float
) -> float:
    """Return how long to wait before the next count: less often while nothing is to be seen."""
    if began is None or count <= began[1] or count >= until:
        return 0.05
    rate = (count - began[1]) / (now - began[0])
    return min(1.0, max(0.05, (until - count) / rate / 2))
