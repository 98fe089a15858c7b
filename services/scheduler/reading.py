"""Reads the blocks of a payload in threads, for an event loop that waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from outbox_server.shared import bounds
from outbox_server.shared.callers import current_claimant, others_call
from outbox_server.shared.errors import FieldViolation, InvalidInput
from outbox_server.shared.intake.blocks import BlockReader, ReadBlock
from outbox_server.shared.intake.rows import RowRejection
from outbox_server.shared.reading_turns import ReadingTurns

T = TypeVar("T")


class ReaderSteps:
    """Runs the steps of one reader in threads, one at a time, the next block in advance."""

    def __init__(
        self, reader: BlockReader, threads: ThreadPoolExecutor, turns: ReadingTurns
    ) -> None:
        """The threads take turns with those of other readers, for the user of the current call."""
        self.reader = reader
        self._threads = threads
        self._turns = turns
        self._owner = current_claimant()
        self._others_call = others_call()
        self._running: asyncio.Future[object] | None = None
        self._ahead: asyncio.Future[ReadBlock | None] | None = None

    def prefetch(self) -> None:
        """Begin to read the next block."""
        self._ahead = self._begin(self.reader.next)

    async def next(self) -> ReadBlock | None:
        """Return the next block, or None after the last."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            ahead = self._begin(self.reader.next)
        # Shielded, so that a cancelled wait does not lose a thread that still runs.
        return await asyncio.shield(ahead)

    async def run(self, step: Callable[[], T]) -> T:
        """Run any other step of the reader."""
        return await asyncio.shield(self._begin(step))

    async def end(self) -> None:
        """Wait for the thread if it still runs, and free the reader's resources."""
        running = self._running
        if running is not None and not running.done():
            self.reader.interrupt()
            await asyncio.wait([running])
        if running is not None and not running.cancelled():
            running.exception()  # retrieved, because asyncio logs an exception that nobody reads
        self.reader.close()

    def _begin(self, step: Callable[[], T]) -> asyncio.Future[T]:
        future = asyncio.get_running_loop().run_in_executor(self._threads, self._in_turn, step)
        self._running = future  # type: ignore[assignment]
        return future

    def _in_turn(self, step: Callable[[], T]) -> T:
        with self._turns.taken(self._owner, self._others_call):
            return step()


def refused_rows(why: str, reason: str, rejections: Sequence[RowRejection]) -> InvalidInput:
    """Return the error of a batch that is refused because of its rows."""
    first = rejections[0]
    violations = [
        FieldViolation(
            f"rows[{rejection.row_number}]{'.' if rejection.column else ''}{rejection.column}",
            f"{rejection.reason}: {rejection.message}",
        )
        for rejection in rejections[: bounds.MAX_SHOWN_REJECTIONS]
    ]
    return InvalidInput(
        f"{why}; the first: row {first.row_number}: {first.message}",
        reason=reason,
        violations=violations,
    )
