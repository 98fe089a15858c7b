"""Reads the addresses of an import: a CSV or rows, in threads of its own, in blocks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final, TypeAlias

from outbox_server.shared import bounds
from outbox_server.shared.callers import current_claimant, others_call
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.fair_shares import FairShares
from outbox_server.shared.intake.addresses import BadAddress, check_address
from outbox_server.shared.intake.csv_reader import read_csv
from outbox_server.shared.intake.guarded_cells import unguarded
from outbox_server.shared.intake.payloads import StreamedChunks
from outbox_server.shared.intake.rows import RowRejection
from outbox_server.shared.reading_turns import ReadingTurns, pass_on

# The number of addresses that one transaction stores.
_BLOCK: Final = 1_000
# How many rows are read, in about 1 ms, before the thread lets others read.
_ROWS_AT_ONCE: Final = 100
# The maximum number of imports at once. Each has a thread, which waits for the caller most of the
# time.
_IMPORTS: Final = 8
_WAITING: Final = 100
_REASON: Final = "reason"

# Some bytes of a CSV, or rows: the address and the reason of each.
Part: TypeAlias = bytes | Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How the addresses are read. `reason` is for all rows without a reason of their own."""

    reason: str = ""
    email_column: str = ""
    skip_lines: int = 0


@dataclass(frozen=True, slots=True)
class ImportBlock:
    """Some rows of an import: the reasons by address, and how many rows have these addresses.

    `content` is a digest of the rows as they were given.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    rejections: Sequence[RowRejection] = ()
    content: bytes = b""


class ImportReader:
    """Reads imports in threads. `shares` has a place for each."""

    def __init__(self, turns: ReadingTurns) -> None:
        self._turns = turns
        self.shares = FairShares("imports", _IMPORTS, waiting=_WAITING)
        self._threads = ThreadPoolExecutor(_IMPORTS, thread_name_prefix="import")

    def close(self) -> None:
        """Free the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def blocks(
        self, parts: AsyncIterator[Part], options: ImportOptions
    ) -> AsyncGenerator[ImportBlock, None]:
        """Yield the blocks of an import. The next one is read when it is needed.

        Raises:
            InvalidInput: UPLOAD_OUT_OF_ORDER, or the CSV cannot be read.
            Unavailable: UPLOAD_STALLED, UPLOAD_TOO_SLOW.
        """
        source = StreamedChunks(parts)
        blocks = _blocks(_rows(iter(source), options), options.reason)
        loop = asyncio.get_running_loop()
        owner, others = current_claimant(), others_call()

        def read_next() -> ImportBlock | None:
            with self._turns.taken(owner, others):
                return next(blocks, None)

        reading: asyncio.Future[ImportBlock | None] | None = None
        try:
            while True:
                reading = loop.run_in_executor(self._threads, read_next)
                # Shielded: the thread goes on until its source is closed.
                block = await asyncio.shield(reading)
                if block is None:
                    return
                yield block
        finally:
            source.close()
            if reading is not None and not reading.done():
                await asyncio.wait([reading])
            if reading is not None and not reading.cancelled():
                reading.exception()  # retrieved, because asyncio logs one that nobody reads


def _rows(parts: Iterator[Part], options: ImportOptions) -> Iterator[tuple[int, str, str]]:
    """Yield the number, the address and the reason of each row."""
    first = next(parts, None)
    if first is None:
        raise _out_of_order("chunk", "one of `chunk` and `rows` must be set in a message")
    if isinstance(first, bytes):
        yield from _csv_rows(_chunks(first, parts), options)
        return
    number = 0
    part: Part | None = first
    while part is not None:
        if isinstance(part, bytes):
            raise _out_of_order("chunk", "must not be set after a message with `rows`")
        for email, reason in part:
            number += 1
            yield number, email, reason
        part = next(parts, None)


def _chunks(first: bytes, parts: Iterator[Part]) -> Iterator[bytes]:
    yield first
    for part in parts:
        if not isinstance(part, bytes):
            raise _out_of_order("rows", "must not be set after a message with `chunk`")
        yield part


def _csv_rows(chunks: Iterator[bytes], options: ImportOptions) -> Iterator[tuple[int, str, str]]:
    table = read_csv(chunks, options.email_column, options.skip_lines)
    reason_at = table.names.index(_REASON) if _REASON in table.names else None
    for number, cells in table.rows():
        email = cells[table.email_index] if table.email_index < len(cells) else ""
        reason = cells[reason_at] if reason_at is not None and reason_at < len(cells) else ""
        yield number, unguarded(email), unguarded(reason)


def _blocks(rows: Iterator[tuple[int, str, str]], reason: str) -> Iterator[ImportBlock]:
    block: dict[str, str] = {}
    rejections: list[RowRejection] = []
    count = 0
    content = blake2b()
    for row, (number, email, own) in enumerate(rows, start=1):
        if not row % _ROWS_AT_ONCE:
            pass_on()
        content.update(f"{number} {len(email)} {len(own)} {email}{own}".encode())
        try:
            address = check_address(email)
            bounds.SUPPRESSION_REASON.check(_REASON, own)
        except BadAddress as error:
            rejections.append(RowRejection(number, "email", error.reason, error.message))
        except InvalidInput as error:
            rejections.append(RowRejection(number, _REASON, error.reason, str(error)))
        else:
            count += 1
            block.setdefault(address, own or reason)
        if count + len(rejections) >= _BLOCK:
            yield ImportBlock(block, count, rejections, content.digest())
            block, rejections, count, content = {}, [], 0, blake2b()
    if count or rejections:
        yield ImportBlock(block, count, rejections, content.digest())


def _out_of_order(field_name: str, message: str) -> InvalidInput:
    return InvalidInput.field(field_name, message, reason="UPLOAD_OUT_OF_ORDER")
