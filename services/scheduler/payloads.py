"""The recipients of a batch, wherever they come from: read in a thread, hashed as they are read."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, Final, NamedTuple, Protocol

from outbox_server.services.scheduler.csv_reader import read_csv
from outbox_server.services.scheduler.rows import CsvPlan, RecipientPlan, RowPlan
from outbox_server.shared.errors import Unavailable
from outbox_server.shared.templates.batch import BatchTemplate

# A caller that sends nothing for so long would hold a transaction open for nothing.
_PATIENCE: Final = timedelta(seconds=60)


class OpenedRows(NamedTuple):
    """Rows that can be read: numbered and raw, with the plan that checks them."""

    plan: RowPlan[Any]
    variable_names: tuple[str, ...]
    rows: Iterator[tuple[int, Any]]


class Payload(Protocol):
    """Recipients, to be read once. All but `close` is called in a thread."""

    @property
    def arrives(self) -> bool:
        """Whether reading may wait for the caller."""

    def hash_first(self, prefix: bytes) -> None:
        """Let the digest begin with `prefix`."""

    def open(self, template: BatchTemplate, time_zone: str) -> OpenedRows:
        """Return the rows.

        Raises:
            InvalidInput: it is no CSV with an address column; the rows raise it too.
        """

    def drain(self) -> None:
        """Read what is left, for the digest alone."""

    def digest(self) -> bytes:
        """Return the SHA-256 of what was read."""

    def close(self) -> None:
        """Make a thread that reads fail at once."""


class UploadChunks(Protocol):
    """A file, piece by piece."""

    def __iter__(self) -> Iterator[bytes]:
        """Yield the pieces."""

    def close(self) -> None:
        """Make a thread that waits for a piece fail at once."""


class CsvPayload:
    """A CSV file, in chunks."""

    def __init__(self, chunks: UploadChunks) -> None:
        self.arrives = isinstance(chunks, StreamedChunks)
        self._source = chunks
        self._digest = hashlib.sha256(b"csv\0")
        self._chunks = self._hashed()

    def hash_first(self, prefix: bytes) -> None:
        """Let the digest begin with `prefix`."""
        self._digest.update(prefix)

    def open(self, template: BatchTemplate, time_zone: str) -> OpenedRows:
        """Read the header; the rows follow."""
        table = read_csv(self._chunks)
        plan = CsvPlan(table, template, time_zone)
        return OpenedRows(plan, plan.variable_names, table.rows())

    def drain(self) -> None:
        """Read what is left, for the digest alone."""
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
    """Rows that the caller made: addresses, and the other columns by name."""

    arrives = False

    def __init__(self, rows: Iterable[tuple[str, Mapping[str, str]]]) -> None:
        self._source = rows
        self._digest = hashlib.sha256(b"rows\0")
        self._rows = self._hashed()

    def hash_first(self, prefix: bytes) -> None:
        """Let the digest begin with `prefix`."""
        self._digest.update(prefix)

    def open(self, template: BatchTemplate, time_zone: str) -> OpenedRows:
        """Return the rows."""
        plan = RecipientPlan(template, time_zone)
        return OpenedRows(plan, plan.variable_names, self._rows)

    def drain(self) -> None:
        """Read what is left, for the digest alone."""
        for _ in self._rows:
            pass

    def digest(self) -> bytes:
        """Return the SHA-256 of what was read."""
        return self._digest.digest()

    def close(self) -> None:
        """Do nothing: these rows do not wait for anyone."""

    def _hashed(self) -> Iterator[tuple[int, tuple[str, Mapping[str, str]]]]:
        for number, row in enumerate(self._source, start=1):
            email, columns = row
            # The order of a map means nothing.
            self._digest.update(json.dumps([email, sorted(columns.items())]).encode())
            yield number, row


class WholeFile:
    """A file that is there."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __iter__(self) -> Iterator[bytes]:
        """Yield it in one piece."""
        yield self._data

    def close(self) -> None:
        """Do nothing."""


class StreamedChunks:
    """Chunks that come over the network, read by a thread while the loop runs on.

    A chunk is fetched when the thread asks for it, so that a caller can send no faster than its
    rows are stored.
    """

    def __init__(self, chunks: AsyncIterator[bytes], patience: timedelta = _PATIENCE) -> None:
        """Take what arrives in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._chunks = chunks
        self._patience = patience
        self._lock = threading.Lock()
        self._closed = False
        self._waiting: Future[bytes | None] | None = None

    def __iter__(self) -> Iterator[bytes]:
        """Yield the chunks, in a thread that is not the loop's.

        Raises:
            Unavailable: UPLOAD_STALLED.
            concurrent.futures.CancelledError: it was closed.
        """
        while True:
            with self._lock:
                # A close that came before would otherwise have nothing to cancel.
                waiting = asyncio.run_coroutine_threadsafe(self._next(), self._loop)
                self._waiting = waiting
                if self._closed:
                    waiting.cancel()
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

    async def _next(self) -> bytes | None:
        try:
            async with asyncio.timeout(self._patience.total_seconds()):
                return await anext(self._chunks, None)
        except TimeoutError:
            raise Unavailable(
                f"the upload stood still for {self._patience.total_seconds():g} s, and was given "
                "up; nothing was accepted, try again",
                reason="UPLOAD_STALLED",
            ) from None
        except Exception:
            # Nobody waits for it any more, so asyncio would complain of an error that no one saw.
            if self._closed:
                return None
            raise
