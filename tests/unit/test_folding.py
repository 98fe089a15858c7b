"""The folding loop: when it continues, when it waits, which errors it survives."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

from outbox_server.services.stats.folding import Pauses, fold_until_stopped
from tests.eventually import PATIENCE, eventually

MOMENT = timedelta(milliseconds=1)
LONG = timedelta(hours=1)


class Deltas:
    """Returns or raises the test's answers to `fold`, and then 0."""

    def __init__(self, *answers: int | Exception) -> None:
        self.answers = list(answers)
        self.calls = 0

    async def fold(self) -> int:
        self.calls += 1
        answer = self.answers.pop(0) if self.answers else 0
        if isinstance(answer, Exception):
            raise answer
        return answer


async def run(deltas: Deltas, calls: int, pauses: Pauses) -> None:
    """Run until `fold` was called `calls` times, then stop; check that no further call follows."""
    stop = asyncio.Event()
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(fold_until_stopped(deltas.fold, stop, pauses))
        await eventually(lambda: deltas.calls >= calls)
        stop.set()
        at_the_stop = deltas.calls
    assert deltas.calls == at_the_stop


async def test_folding_runs_without_a_pause_until_no_deltas_are_left() -> None:
    deltas = Deltas(10_000, 10_000, 3)
    await run(deltas, 4, Pauses(busy=LONG, idle=LONG, failing=LONG))
    assert deltas.calls == 4


async def test_folding_pauses_for_the_busy_time_after_deltas() -> None:
    started = time.monotonic()
    # Three rounds, each with a last call that finds nothing; two pauses between them.
    await run(Deltas(3, 0, 2, 0, 1), 6, Pauses(busy=20 * MOMENT, idle=LONG, failing=LONG))
    assert time.monotonic() - started >= 2 * 0.020


async def test_without_deltas_the_pauses_grow_up_to_the_idle_time() -> None:
    started = time.monotonic()
    await run(Deltas(), 6, Pauses(busy=5 * MOMENT, idle=20 * MOMENT, failing=LONG))
    assert time.monotonic() - started >= 0.010 + 4 * 0.020


async def test_folding_retries_after_an_error_and_a_pause() -> None:
    deltas = Deltas(OSError("gone"), ValueError("odd"), OSError("gone"), 5)
    await run(deltas, 5, Pauses(busy=MOMENT, idle=LONG, failing=2 * MOMENT))


async def test_a_stop_ends_a_pause() -> None:
    await run(Deltas(OSError("gone")), 1, Pauses(busy=LONG, idle=LONG, failing=LONG))
