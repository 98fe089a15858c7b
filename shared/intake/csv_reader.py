"""Reads CSV files as spreadsheets write them, as a stream: memory does not grow with the file.

It reads RFC 4180 and its common variants: UTF-8 with or without BOM, UTF-16 with BOM; separators
`,` `;` tab `|`; line ends CRLF, LF or CR; line breaks in quoted cells. Blank lines are skipped.

Rows are numbered from 1 after the header. Blank lines count, so that row n is line n + 1 of the
spreadsheet.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from outbox_server.shared.bounds import MAX_CELL, MAX_COLUMN_NAME, MAX_COLUMNS, MAX_HEADER
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.templates.batch import variable_name

EMAIL_NAMES = frozenset({"email", "e_mail", "email_address", "e_mail_address", "recipient", "to"})
# The column of a row's time zone. The second name is of older files; a file has one of them.
ZONE_NAMES = ("time_zone", "timezone")
_SEPARATORS = ",;\t|"
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
# The line in which Excel names the separator, before the header.
_SEPARATOR_LINE = re.compile(r"sep=(.)\s*", re.IGNORECASE)
_MAX_SHOWN_COLUMNS = 50
_MAX_SHOWN = 80
_TOO_LONG = (
    f"a cell or a line has more than {MAX_CELL:,} characters; check that each quote is closed"
)
_HEADER_TOO_LONG = (
    f"the header must have at most {MAX_HEADER:,} characters; "
    "check that the first line has the names of the columns"
)
# The last line that the csv module gets. The input has no NUL, so no row looks like it. If this
# line became part of another row, a quote is still open.
_END = "\0"
_FINAL = ((b"", True),)


@dataclass(frozen=True, slots=True)
class CsvTable:
    """A CSV whose header has been read.

    `columns` has the cells of the header as written. `names` has their variable names; an empty
    cell has an empty name. `email_index` is the index of the address column.
    """

    columns: tuple[str, ...]
    names: tuple[str, ...]
    email_index: int
    separator: str
    _rows: Iterator[tuple[int, list[str]]]

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Return the numbers and cells of the rows. Can be called once.

        Raises:
            InvalidInput: while reading; CSV_NO_ROWS, CSV_NOT_UTF8, CSV_NUL, CSV_UNCLOSED_QUOTE,
                CSV_CELL_TOO_LONG.
        """
        return self._rows


class _BadText(Exception):
    """The text cannot be read further. `at` adds the row to `problem`."""

    def __init__(self, reason: str, problem: str, offset: int) -> None:
        super().__init__(problem)
        self.reason = reason
        self.problem = problem
        self.offset = offset

    def at(self, where: str) -> InvalidInput:
        return InvalidInput(
            f"{where}: {self.problem}",
            reason=self.reason,
            metadata={"offset": str(self.offset)} if self.offset >= 0 else {},
        )


def read_csv(chunks: Iterator[bytes]) -> CsvTable:
    """Read the header of a CSV. The rows are read as they are needed.

    Raises:
        InvalidInput: CSV_EMPTY, CSV_HEADER_TOO_LONG, CSV_NO_EMAIL_COLUMN, CSV_DUPLICATE_COLUMN,
            or an error of `rows`.
    """
    # The csv module has one limit for the whole process. Its default of 131,072 is too low.
    csv.field_size_limit(MAX_CELL)
    state = _EndMarker()
    lines = _lines(chunks, state)
    try:
        header_lines, separator = _header_lines(lines, state)
    except _BadText as error:
        raise error.at("in the header") from None
    reader = csv.reader(chain(header_lines, lines), delimiter=separator)
    try:
        columns = tuple(cell.strip() for cell in next(reader))
    except csv.Error:
        raise _cell_too_long("in the header") from None
    except _BadText as error:
        raise error.at("in the header") from None
    _check_header(columns)
    names = tuple(map(variable_name, columns))
    return CsvTable(columns, names, _email_index(columns, names), separator, _rows(reader, state))


class _EndMarker:
    """Knows whether the line that marks the end has been read."""

    __slots__ = ("reached",)

    def __init__(self) -> None:
        self.reached = False

    def mark(self) -> Iterator[str]:
        """Yield the line that marks the end."""
        self.reached = True
        yield _END


def _rows(reader: Iterator[list[str]], state: _EndMarker) -> Iterator[tuple[int, list[str]]]:
    number = 0
    empty = True
    try:
        for cells in reader:
            number += 1
            if state.reached:
                if cells != [_END]:
                    raise _unclosed_quote(f"row {number}")
                break
            if not cells or (len(cells) == 1 and cells[0].isspace()):
                continue
            empty = False
            yield number, cells
    except _BadText as error:
        raise error.at(f"row {number + 1}") from None
    except csv.Error:
        raise _cell_too_long(f"row {number + 1}") from None
    if empty:
        raise InvalidInput("the CSV has no rows after the header", reason="CSV_NO_ROWS")


def _lines(chunks: Iterator[bytes], state: _EndMarker) -> Iterator[str]:
    """Return the lines with their ends, followed by the line that marks the end.

    To be fast, no Python code runs for a single line.
    """
    pieces = _pieces(_texts(chunks))
    lines = chain.from_iterable(io.StringIO(piece, newline="") for piece in pieces)
    return chain(lines, state.mark())


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    """Yield the text cut at line ends.

    Each character is read once, however long a line is. A CR at the end of a text is held back,
    because an LF may follow in the next text.
    """
    tail: list[str] = []
    tail_length = 0
    held = ""
    for arrived in texts:
        text = held + arrived
        held = ""
        if text.endswith("\r"):
            text, held = text[:-1], "\r"
        newline = text.rfind("\n")
        cut = max(newline, text.rfind("\r", newline + 1)) + 1
        if cut:
            tail.append(text[:cut])
            yield "".join(tail)
            tail, tail_length = [], 0
        tail.append(text[cut:])
        tail_length += len(text) - cut
        if tail_length > MAX_CELL:
            raise _BadText("CSV_CELL_TOO_LONG", _TOO_LONG, -1)
    rest = "".join(tail) + held
    if rest:
        yield rest


def _texts(chunks: Iterator[bytes]) -> Iterator[str]:
    """Yield the decoded chunks.

    The text before invalid bytes is yielded first, so that the error can name the row.
    """
    data = b""
    chunks = iter(chunks)
    for chunk in chunks:
        data += chunk
        if len(data) >= len(codecs.BOM_UTF8):
            break
    name, bom = _encoding(data)
    decode = codecs.getdecoder(name)
    incremental = codecs.getincrementaldecoder(name)
    offset, data = len(bom), data[len(bom) :]
    decoder = incremental("strict")
    for chunk, final in chain(((data, False),), ((chunk, False) for chunk in chunks), _FINAL):
        start = offset - len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=final)
        except UnicodeDecodeError as error:
            good, _ = decode(error.object[: error.start])
            yield from _checked(good, start, name)
            raise _not_text(error, start, name) from None
        offset += len(chunk)
        if text:
            yield from _checked(text, start, name)


def _encoding(data: bytes) -> tuple[str, bytes]:
    for bom, name in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if data.startswith(bom):
            return name, bom
    return "utf-8", b""


def _checked(text: str, start: int, encoding: str) -> Iterator[str]:
    """Yield `text`, but raise at the first NUL, which PostgreSQL cannot store."""
    nul = text.find("\0")
    if nul < 0:
        yield text
        return
    good = text[:nul]
    yield good
    offset = start + len(good.encode(encoding))
    raise _BadText("CSV_NUL", f"a NUL character at byte {offset}", offset)


def _not_text(error: UnicodeDecodeError, start: int, encoding: str) -> _BadText:
    offset = start + error.start
    bad = error.object[error.start : error.end].hex(" ").upper()
    hint = "; save the file as UTF-8" if encoding == "utf-8" else ""
    return _BadText(
        "CSV_NOT_UTF8",
        f"the bytes {bad} at byte {offset} are not valid {encoding.upper()}{hint}",
        offset,
    )


def _header_lines(lines: Iterator[str], state: _EndMarker) -> tuple[list[str], str]:
    """Return the lines of the header, which is the first row that is not blank, and its separator.

    The header has more than one line if a quoted cell contains a line break.
    """
    separator = ""
    header: list[str] = []
    length = quotes = 0
    for line in lines:
        if state.reached:
            break
        if not header:
            note = _SEPARATOR_LINE.fullmatch(line)
            if note:
                separator = note[1]
                continue
            if not line.strip():
                continue
        header.append(line)
        length += len(line)
        if length > MAX_HEADER:
            raise _BadText("CSV_HEADER_TOO_LONG", _HEADER_TOO_LONG, -1)
        # An odd number of quotes means that one is open. A doubled quote counts as two.
        quotes += line.count('"')
        if quotes % 2 == 0:
            break
    if not header:
        raise InvalidInput("the CSV is empty", reason="CSV_EMPTY")
    if state.reached:
        raise _unclosed_quote("the header")
    return header, separator or _separator("".join(header))


def _separator(header: str) -> str:
    """Return the most frequent separator with which `header` has an e-mail column.

    If there is none, return the most frequent separator. Quoted text does not count.
    """
    bare = _QUOTED.sub("", header)
    candidates = sorted(_SEPARATORS, key=bare.count, reverse=True)
    for separator in candidates:
        cells = next(csv.reader(io.StringIO(header, newline=""), delimiter=separator))
        short = (cell for cell in cells if len(cell) <= MAX_COLUMN_NAME)
        if any(variable_name(cell) in EMAIL_NAMES for cell in short):
            return separator
    return candidates[0]


def _check_header(columns: Sequence[str]) -> None:
    """Check the header before its names are normalised.

    Raises:
        InvalidInput: CSV_HEADER_TOO_LONG.
    """
    wrong = ""
    # Spreadsheets may write many nameless columns at the end.
    named = sum(map(bool, columns))
    if named > MAX_COLUMNS:
        wrong = f"a CSV must have at most {MAX_COLUMNS:,} columns (got {named:,})"
    longest = max(columns, key=len)
    if len(longest) > MAX_COLUMN_NAME:
        wrong = (
            f"the name of a column must have at most {MAX_COLUMN_NAME} characters "
            f"(got {len(longest):,}): {_show(longest)}"
        )
    if wrong:
        raise InvalidInput(f"in the header: {wrong}", reason="CSV_HEADER_TOO_LONG")


def _email_index(columns: Sequence[str], names: Sequence[str]) -> int:
    seen: dict[str, str] = {}
    for column, name in zip(columns, names, strict=True):
        if name and name in seen:
            raise InvalidInput(
                f"the columns {_show(seen[name])} and {_show(column)} have the same variable name, "
                f"`{name}`; rename one",
                reason="CSV_DUPLICATE_COLUMN",
                metadata={"column": name},
            )
        seen[name] = column
    if seen.keys() >= set(ZONE_NAMES):
        first, second = (seen[name] for name in ZONE_NAMES)
        raise InvalidInput(
            f"the columns {_show(first)} and {_show(second)} both give the time zone of a row; "
            "keep one",
            reason="CSV_DUPLICATE_COLUMN",
            metadata={"column": ZONE_NAMES[1]},
        )
    if "email" in names:
        return names.index("email")
    for index, name in enumerate(names):
        if name in EMAIL_NAMES:
            return index
    found = ", ".join(map(_show, columns[:_MAX_SHOWN_COLUMNS]))
    raise InvalidInput(
        f"the CSV must have a column `email`; its columns are {found}",
        reason="CSV_NO_EMAIL_COLUMN",
        metadata={"columns": found},
    )


def _unclosed_quote(where: str) -> InvalidInput:
    return InvalidInput(
        f'{where}: a quote (") that begins here is never closed', reason="CSV_UNCLOSED_QUOTE"
    )


def _cell_too_long(where: str) -> InvalidInput:
    return InvalidInput(f"{where}: {_TOO_LONG}", reason="CSV_CELL_TOO_LONG")


def _show(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "...")
