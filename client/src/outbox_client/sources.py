"""The sources of an upload, and their conversion to chunks of CSV, in bounded memory.

Takes a path, bytes, a binary file, an iterable (with asyncio also an asynchronous one) of bytes or
of rows, or a table with `to_csv` (pandas) or `write_csv` (polars).
"""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, TypeAlias

CHUNK_BYTES: Final = 64 * 1024
READ_BYTES: Final = 64 * 1024
_TAKES: Final = (
    "a path, bytes, a binary file, an iterable of bytes or of rows (mappings), "
    "or a table with to_csv or write_csv"
)

Row: TypeAlias = Mapping[str, Any]


class PandasLike(Protocol):
    """A table that writes itself as text."""

    def to_csv(self, path_or_buf: Any, *, index: bool) -> Any:
        """Write it."""


class PolarsLike(Protocol):
    """A table that writes itself as bytes."""

    def write_csv(self, file: Any) -> Any:
        """Write it."""


BlockingRows: TypeAlias = (
    "str | os.PathLike[str] | bytes | BinaryIO | Iterable[bytes] | Iterable[Row]"
    " | PandasLike | PolarsLike"
)
Rows: TypeAlias = "BlockingRows | AsyncIterable[bytes] | AsyncIterable[Row]"


@dataclass(frozen=True, slots=True)
class UploadProgress:
    """How far an upload is. A try that is repeated begins again at zero."""

    # The bytes that were read and passed to the connection.
    sent_bytes: int
    # How many bytes there are; None: nobody knows before the end.
    total_bytes: int | None
    # Rows that were read, the header not counted; of a CSV its line ends outside of quotes.
    rows: int


ProgressCallback: TypeAlias = Callable[[UploadProgress], None]


class Source:
    """Something that can be opened: once, or once for every try."""

    def __init__(
        self,
        opener: Callable[[], AbstractContextManager[Any]],
        *,
        size: int | None = None,
        repeatable: bool = True,
    ) -> None:
        self.open = opener
        self.size = size
        self.repeatable = repeatable


def source_of(rows: Any) -> Source:
    """Return what can be opened, whatever it is made from.

    Raises:
        TypeError: it is nothing of the kind.
        OSError: there is no such file.
    """
    if isinstance(rows, str | os.PathLike):
        path = Path(rows)
        # The size of a pipe is unknown, and it cannot be read twice.
        return Source(
            lambda: path.open("rb"),
            size=path.stat().st_size if path.is_file() else None,
            repeatable=path.is_file(),
        )
    if isinstance(rows, bytes | bytearray | memoryview):
        return Source(lambda: io.BytesIO(rows), size=len(bytes(rows)))
    if hasattr(rows, "to_csv") or hasattr(rows, "write_csv"):
        return Source(lambda: _written(rows))
    if hasattr(rows, "read"):
        return _file(rows)
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable | AsyncIterable):
        raise TypeError(f"{type(rows).__name__} is none of: {_TAKES}")
    # An iterator is used up by its first try; a list, say, gives a new one for each.
    once = hasattr(rows, "__next__") or hasattr(rows, "__anext__")
    return Source(lambda: nullcontext(rows), repeatable=not once)


def _file(file: BinaryIO) -> Source:
    if isinstance(file.read(0), str):
        raise TypeError("the file is open for text: open it with mode 'rb'")
    if not file.seekable():
        return Source(lambda: nullcontext(file), repeatable=False)
    start = file.tell()
    size = file.seek(0, os.SEEK_END) - start

    @contextmanager
    def rewound() -> Iterator[BinaryIO]:
        file.seek(start)
        yield file

    return Source(rewound, size=size)


@contextmanager
def _written(table: Any) -> Iterator[BinaryIO]:
    """Let a table write itself to a temporary file: as text it would be in memory twice."""
    with tempfile.TemporaryFile() as file:
        if hasattr(table, "write_csv"):
            table.write_csv(file)
        else:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
            table.to_csv(text, index=False)
            text.detach()
        file.seek(0)
        yield file


class Chunks:
    """Joins the items of a source to chunks of a good size, rows as CSV, and counts them."""

    def __init__(self) -> None:
        self.rows = 0
        self._buffer = io.BytesIO()
        self._table: _Table | None = None
        self._lines = _LineCounter()

    def take(self, item: Any) -> Iterator[bytes]:
        """Add bytes or a row; yield the chunks that are full.

        Raises:
            TypeError: it is neither.
            ValueError: a row has a column that the first one has not.
        """
        if isinstance(item, Mapping):
            if self._table is None:
                self._table = _Table(list(item))
                self._buffer.write(self._table.header())
            self._buffer.write(self._table.line(item))
            self.rows += 1
        elif isinstance(item, bytes | bytearray | memoryview) and self._table is None:
            self._buffer.write(item)
            self._lines.add(bytes(item))
            self.rows = self._lines.rows
        else:
            raise TypeError(f"{type(item).__name__} among what is uploaded: it takes {_TAKES}")
        if self._buffer.tell() >= CHUNK_BYTES:
            yield from self.rest()

    def rest(self) -> Iterator[bytes]:
        """Yield the remaining bytes."""
        data = self._buffer.getvalue()
        self._buffer = io.BytesIO()
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


class _Table:
    """Rows as CSV, with the columns of the first row."""

    def __init__(self, columns: list[Any]) -> None:
        self._columns = columns
        self._known = frozenset(columns)
        self._text = io.StringIO(newline="")
        self._writer = csv.writer(self._text, lineterminator="\r\n")
        self._count = 0

    def header(self) -> bytes:
        return self._encode(self._columns)

    def line(self, row: Row) -> bytes:
        self._count += 1
        if not self._known.issuperset(row):
            unknown = next(name for name in row if name not in self._known)
            raise ValueError(
                f"row {self._count} has a column {unknown!r} that the first row has not"
            )
        return self._encode(_cell(row.get(name)) for name in self._columns)

    def _encode(self, cells: Iterable[Any]) -> bytes:
        self._text.seek(0)
        self._text.truncate()
        self._writer.writerow(list(cells))
        return self._text.getvalue().encode()


def _cell(value: Any) -> Any:
    """Return times as RFC 3339 and nothing at all for None; the csv module does the rest."""
    return value.isoformat() if isinstance(value, date) else value


class _LineCounter:
    """Counts the line ends of a CSV outside of quotes, whatever ends its lines."""

    def __init__(self) -> None:
        self._feeds = 0
        self._returns = 0
        self._quoted = False
        self._open = False

    def add(self, data: bytes) -> None:
        if not data:
            return
        outside = data.split(b'"')
        first = 1 if self._quoted else 0
        for part in outside[first::2]:
            self._feeds += part.count(b"\n")
            self._returns += part.count(b"\r")
        self._quoted ^= len(outside) % 2 == 0
        self._open = data[-1:] not in b"\r\n"

    @property
    def rows(self) -> int:
        """Return the rows so far, without the header."""
        return max(max(self._feeds, self._returns) + self._open - 1, 0)
