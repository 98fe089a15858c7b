"""Reads the recipients of a batch in a thread, and hashes what it reads."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from outbox_server.shared.bounds import MAX_ROW_VALUES
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.intake.csv_reader import read_csv
from outbox_server.shared.intake.rows import (
    CsvPlan,
    RawRow,
    ReadingRules,
    RecipientPlan,
    RowPlan,
)
from outbox_server.shared.reading_turns import given_back
from outbox_server.shared.templates.batch import BatchTemplate

C = TypeVar("C")


class OpenedRows(NamedTuple):
    """Numbered raw rows, and the plan that checks them.

    `email_column` is the column of the addresses, as the CSV calls it; empty without a CSV.
    """

    plan: RowPlan[Any]
    variable_names: tuple[str, ...]
    rows: Iterator[tuple[int, Any]]
    email_column: str = ""


class Payload(Protocol):
    """Recipients that can be read once. All methods but `close` are called in a thread."""

    @property
    def arrives(self) -> bool:
        """Whether reading may wait for the caller."""

    def hash_first(self, prefix: bytes) -> None:
        """Let the digest begin with `prefix`."""

    def open(self, template: BatchTemplate, rules: ReadingRules) -> OpenedRows:
        """Return the rows.

        Raises:
            InvalidInput: it is not a CSV with an address column. Reading the rows may raise it too.
        """

    def drain(self) -> None:
        """Read the rest, only to complete the digest."""

    def digest(self) -> bytes:
        """Return the SHA-256 of what was read."""

    def close(self) -> None:
        """Make a thread that is reading fail at once."""


class UploadChunks(Protocol):
    """The chunks of a file."""

    def __iter__(self) -> Iterator[bytes]:
        """Yield the chunks."""

    def close(self) -> None:
        """Make a thread that waits for a chunk fail at once."""


class CsvPayload:
    """A CSV file that arrives in chunks."""

    def __init__(self, chunks: UploadChunks) -> None:
        self.arrives = isinstance(chunks, StreamedChunks)
        self._source = chunks
        self._digest = hashlib.sha256(b"csv\0")
        self._chunks = self._hashed()

    def hash_first(self, prefix: bytes) -> None:
        """Let the digest begin with `prefix`."""
        self._digest.update(prefix)

    def open(self, template: BatchTemplate, rules: ReadingRules) -> OpenedRows:
        """Read the header. The rows are read as they are needed."""
        table = read_csv(self._chunks, rules.email_column, rules.skip_lines)
        plan = CsvPlan(table, template, rules)
        column = table.columns[table.email_index]
        return OpenedRows(plan, plan.variable_names, table.rows(), column)

    def drain(self) -> None:
        """Read the rest, only to complete the digest."""
        for _ in self._chunks:
            pass

    def digest(self) -> bytes:
        """Return the SHA-256 of what was read."""
        return self._digest.digest()

    def close(self) -> None:
        """Make a thread that waits for a chunk fail at once."""
        self._source.close()

    def _hashed(self) -> Iterator[bytes]:
        for chunk in self._source:
            self._digest.update(chunk)
            yield chunk


class RowsPayload:
    """Structured rows: addresses, and the other columns by name."""

    arrives = False

    def __init__(self, rows: Iterable[RawRow | tuple[str, Mapping[str, str]]], count: int) -> None:
        """`count` is the number of `rows`."""
        self._source = rows
        self._count = count
        self._digest = hashlib.sha256(b"rows\0")
        self._rows = self._hashed()

    def hash_first(self, prefix: bytes) -> None:
        """Let the digest begin with `prefix`."""
        self._digest.update(prefix)

    def open(self, template: BatchTemplate, rules: ReadingRules) -> OpenedRows:
        """Return the rows, without empty ones."""
        for option, reason in (
            ("email_column", "EMAIL_COLUMN_INVALID"),
            ("skip_lines", "SKIP_LINES_INVALID"),
            ("external_id_column", "EXTERNAL_ID_COLUMN_INVALID"),
            ("label_columns", "LABEL_COLUMNS_INVALID"),
        ):
            if getattr(rules, option):
                raise InvalidInput.field(
                    f"options.{option}",
                    "is for a CSV; rows have no header, but fields for address, id and labels",
                    reason=reason,
                )
        # Each row stores a value for each column of the templates, and may have none of them.
        names = len(template.variable_names)
        if names * self._count > MAX_ROW_VALUES:
            most = MAX_ROW_VALUES // names
            raise InvalidInput.field(
                "recipients.rows",
                f"must have at most {most:,} entries if the templates use {names:,} columns "
                f"(got {self._count:,})",
                reason="TOO_MANY_ENTRIES",
            )
        plan = RecipientPlan(template, rules)
        return OpenedRows(plan, plan.variable_names, self._filled())

    def _filled(self) -> Iterator[tuple[int, RawRow]]:
        """Yield the rows that are not empty, as a CSV's empty rows are left out."""
        empty = True
        for number, row in self._rows:
            if row.email.strip() or any(map(str.strip, row.columns.values())):
                empty = False
                yield number, row
        if empty:
            raise InvalidInput.field(
                "recipients.rows",
                "must have recipients: every row is empty",
                reason="PAYLOAD_REQUIRED",
            )

    def drain(self) -> None:
        """Read the rest, only to complete the digest."""
        for _ in self._rows:
            pass

    def digest(self) -> bytes:
        """Return the SHA-256 of what was read."""
        return self._digest.digest()

    def close(self) -> None:
        """Do nothing, because reading these rows never waits."""

    def _hashed(self) -> Iterator[tuple[int, RawRow]]:
        for number, given in enumerate(self._source, start=1):
            row = RawRow(*given)
            # Sorted, because a map has no order.
            hashed: list[Any] = [row.email, sorted(row.columns.items())]
            # They are included only if they are set, so that batches from before these fields keep
            # their digests.
            if row.external_id or row.labels:
                hashed += [row.external_id, sorted(row.labels.items())]
            self._digest.update(json.dumps(hashed).encode())
            yield number, row


class WholeFile:
    """A file that is in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __iter__(self) -> Iterator[bytes]:
        """Yield the file as one chunk."""
        yield self._data

    def close(self) -> None:
        """Do nothing, because reading this file never waits."""


class StreamedChunks(Generic[C]):
    """Chunks from the network, which a thread reads while the event loop goes on.

    A chunk is fetched only when the thread needs it. So a caller cannot send faster than its rows
    are stored.
    """

    def __init__(self, chunks: AsyncIterator[C]) -> None:
        """Receive `chunks` in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._chunks = chunks
        self._lock = threading.Lock()
        self._closed = False
        self._waiting: Future[C | None] | None = None

    def __iter__(self) -> Iterator[C]:
        """Yield the chunks. Must not be called in the thread of the event loop.

        Raises:
            Unavailable: UPLOAD_STALLED, UPLOAD_TOO_SLOW.
            concurrent.futures.CancelledError: `close` was called.
        """
        while True:
            with self._lock:
                # If `close` was called before, it had nothing to cancel.
                waiting = asyncio.run_coroutine_threadsafe(self._next(), self._loop)
                self._waiting = waiting
                if self._closed:
                    waiting.cancel()
            with given_back():
                chunk = waiting.result()
            if chunk is None:
                return
            yield chunk

    def close(self) -> None:
        """Make a thread that waits for a chunk, now or later, fail."""
        with self._lock:
            self._closed = True
            if self._waiting is not None:
                self._waiting.cancel()

    async def _next(self) -> C | None:
        try:
            return await anext(self._chunks, None)
        except Exception:
            # Nobody waits for the result any more, so asyncio would log the error as unhandled.
            if self._closed:
                return None
            raise
