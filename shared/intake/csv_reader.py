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

from outbox_server.shared.bounds import (
    MAX_CELL,
    MAX_CELLS,
    MAX_COLUMN_NAME,
    MAX_COLUMNS,
    MAX_HEADER,
)
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.intake.address_column import find_email_column, no_email_column
from outbox_server.shared.intake.csv_header import HeaderCandidate, choose
from outbox_server.shared.quoting import quoted
from outbox_server.shared.templates.batch import variable_name

# The names of the column with a row's time zone. The second name occurs in older files; a file may
# have only one of them.
ZONE_NAMES = ("time_zone", "timezone")
_SEPARATORS = ",;\t|"
# The line in which Excel names the separator, before the header.
_SEPARATOR_LINE = re.compile(r"sep=(.)\s*", re.IGNORECASE)
# The mark by which DOS ended a text file, and which some programs still write.
_END_OF_FILE = "\x1a"
# If more of these marks and blanks end a text, they count as data.
_MOST_AT_THE_END = 4096
# What a line of empty cells consists of.
_EMPTY_LINE = f'{_SEPARATORS}" \r\n\u00a0'
_TOO_LONG = (
    f"a cell, a line or a row has more than {MAX_CELL:,} characters; "
    "check that each quote is closed"
)
_TOO_MANY_CELLS = f"a line has more than {MAX_CELLS:,} separators"
_HEADER_TOO_LONG = (
    f"the header must have at most {MAX_HEADER:,} characters; "
    "check that the first line has the names of the columns"
)
# The last line that the csv module gets. The input has no NUL, so no row equals it. If it became
# part of another row, a quote is still open.
_END = "\0"
_FINAL = ((b"", True),)


@dataclass(frozen=True, slots=True)
class CsvTable:
    """A CSV whose header has been read.

    `columns` has the cells of the header as written. `names` has their variable names; an empty
    cell has an empty name, and two columns may have the same one. `email_index` is the index of the
    address column.
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


def read_csv(chunks: Iterator[bytes], email_column: str = "", skip_lines: int = 0) -> CsvTable:
    """Read the header of a CSV. The rows are read as they are needed.

    `email_column` names the column of the addresses; if it is empty, the column is found by its
    name. `skip_lines` is the number of lines before the header.

    Raises:
        InvalidInput: CSV_EMPTY, CSV_HEADER_TOO_LONG, CSV_NO_EMAIL_COLUMN, CSV_DUPLICATE_COLUMN,
            or an error of `rows`.
    """
    # The csv module has one limit for the whole process. Its default of 131,072 is too low.
    csv.field_size_limit(MAX_CELL)
    state = _Progress()
    lines = _lines(chunks, state)
    try:
        header_lines, separator = _header_lines(lines, state, email_column, skip_lines)
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
    email_index = find_email_column(columns, names, email_column)
    if email_index is None:
        raise no_email_column(columns, email_column)
    return CsvTable(columns, names, email_index, separator, _rows(reader, state))


class _Progress:
    """Whether the line that marks the end has been read, and how much text was read."""

    __slots__ = ("before_row", "reached", "read")

    def __init__(self) -> None:
        self.reached = False
        # The number of characters that the csv module got: in all, and before the row that it is
        # reading.
        self.read = self.before_row = 0

    def mark(self) -> Iterator[str]:
        """Yield the line that marks the end."""
        self.reached = True
        yield _END


def _rows(reader: Iterator[list[str]], state: _Progress) -> Iterator[tuple[int, list[str]]]:
    number = 0
    empty = True
    try:
        for cells in reader:
            number += 1
            state.before_row = state.read
            if state.reached:
                if cells != [_END]:
                    raise _unclosed_quote(f"row {number}")
                break
            # Spreadsheets write separators for empty rows.
            if not cells or (not cells[0].strip() and not "".join(cells).strip()):
                continue
            empty = False
            yield number, cells
    except _BadText as error:
        raise error.at(f"row {number + 1}") from None
    except csv.Error:
        raise _cell_too_long(f"row {number + 1}") from None
    if empty:
        raise InvalidInput("the CSV has no rows after the header", reason="CSV_NO_ROWS")


def _lines(chunks: Iterator[bytes], state: _Progress) -> Iterator[str]:
    """Return the lines with their ends, followed by the line that marks the end.

    To be fast, no Python code runs for a single line.
    """
    pieces = _checked_pieces(_pieces(_without_end_mark(_texts(chunks))), state)
    lines = chain.from_iterable(io.StringIO(piece, newline="") for piece in pieces)
    return chain(lines, state.mark())


def _checked_pieces(pieces: Iterator[str], state: _Progress) -> Iterator[str]:
    """Yield the pieces; fail at a row that is too long, or at a line of too many cells.

    A row of many lines, as an open quote makes it, would take memory without end. The csv module
    splits a line in one step, which stops all other threads.
    """
    for piece in pieces:
        if state.read - state.before_row > MAX_CELL:
            raise _BadText("CSV_CELL_TOO_LONG", _TOO_LONG, -1)
        state.read += len(piece)
        bad = _line_of_many_cells(piece)
        if bad is not None:
            yield piece[:bad]
            raise _BadText("CSV_CELL_TOO_LONG", _TOO_MANY_CELLS, -1)
        yield piece


def _line_of_many_cells(piece: str) -> int | None:
    """Return where a line with too many separators begins; None if there is none.

    Only lines that are long enough are looked at.
    """
    at = 0
    while len(piece) - at > MAX_CELLS:
        newline = piece.rfind("\n", at, at + MAX_CELLS)
        end = max(newline, piece.rfind("\r", max(newline + 1, at), at + MAX_CELLS)) + 1
        if not end:
            ends = [piece.find(mark, at + MAX_CELLS) + 1 for mark in "\r\n"]
            end = min(filter(None, ends), default=len(piece))
            if any(piece.count(mark, at, end) > MAX_CELLS for mark in _SEPARATORS):
                return at
        at = end
    return None


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


def _without_end_mark(texts: Iterator[str]) -> Iterator[str]:
    """Yield the texts without the end-of-file marks (Ctrl-Z) at the end of the last one."""
    held = ""
    for arrived in texts:
        text = held + arrived
        held = ""
        if text.endswith((_END_OF_FILE, "\r", "\n", " ")) and _END_OF_FILE in text:
            # A regular expression would take long for many marks before other text.
            last = len(text.rstrip(f"{_END_OF_FILE} \r\n"))
            mark = text.find(_END_OF_FILE, last)
            if mark >= 0 and len(text) - mark <= _MOST_AT_THE_END:
                text, held = text[:mark], text[mark:]
        if text:
            yield text


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
            # A single byte at the end of UTF-16, as `copy` of DOS adds it.
            if error.object[error.start :] == _END_OF_FILE.encode():
                return
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


def _header_lines(
    lines: Iterator[str], state: _Progress, email_column: str, skip_lines: int
) -> tuple[list[str], str]:
    """Return the lines of the header, which is the first row that is not empty, and its separator.

    The header has more than one line if a quoted cell contains a line break.
    """
    noted = ""
    header: list[str] = []
    length = number = 0
    candidates: list[HeaderCandidate] = []
    for line in lines:
        if state.reached:
            break
        number += 1
        if not header:
            note = _SEPARATOR_LINE.fullmatch(line)
            if note:
                noted = note[1]
            if note or number <= skip_lines or not line.strip(_EMPTY_LINE):
                continue
            candidates = [HeaderCandidate(each) for each in (noted or _SEPARATORS)]
        header.append(line)
        length += len(line)
        if length > MAX_HEADER:
            raise _BadText("CSV_HEADER_TOO_LONG", _HEADER_TOO_LONG, -1)
        for each in candidates:
            each.add(line)
        best = choose(candidates, email_column)
        if best is not None:
            return header, best.separator
    raise _unclosed_quote("the header") if header else _empty(skip_lines)


def _empty(skip_lines: int) -> InvalidInput:
    skipped = f" after the {skip_lines:,} lines that options.skip_lines skips" if skip_lines else ""
    return InvalidInput(f"the CSV is empty{skipped}", reason="CSV_EMPTY")


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
            f"(got {len(longest):,}): {quoted(longest)}"
        )
    if wrong:
        raise InvalidInput(f"in the header: {wrong}", reason="CSV_HEADER_TOO_LONG")


def _unclosed_quote(where: str) -> InvalidInput:
    return InvalidInput(
        f'{where}: a quote (") that begins here is never closed', reason="CSV_UNCLOSED_QUOTE"
    )


def _cell_too_long(where: str) -> InvalidInput:
    return InvalidInput(f"{where}: {_TOO_LONG}", reason="CSV_CELL_TOO_LONG")
