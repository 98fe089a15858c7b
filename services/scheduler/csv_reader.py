"""A CSV as spreadsheets really write it, read as a stream: memory does not grow with the file.

RFC 4180 and its relatives: UTF-8 with or without BOM, UTF-16 with BOM; separators `,` `;` tab `|`;
lines end in CRLF, LF or CR; quoted cells hold line breaks; blank lines are skipped.

Rows are numbered from 1, the header not counted, blank lines counted: row n is line n + 1 of the
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

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.templates.batch import variable_name

EMAIL_NAMES = frozenset({"email", "e_mail", "email_address", "e_mail_address", "recipient", "to"})
# A cell longer than the largest mail: most likely a quote that is never closed.
MAX_CELL_CHARACTERS = 16 * 1024 * 1024
_SEPARATORS = ",;\t|"
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
# Excel's own note to itself, before the header.
_SEPARATOR_LINE = re.compile(r"sep=(.)\s*", re.IGNORECASE)
_MAX_SHOWN_COLUMNS = 50
_MAX_SHOWN = 80
_TOO_LONG = (
    f"a cell or line of more than {MAX_CELL_CHARACTERS // 1024 // 1024} Mi characters; "
    "is a quote never closed?"
)
# Ends the lines that csv gets. NUL is refused in the input, so no row can look like it, and if the
# last row has swallowed it, a quote is open.
_END = "\0"
_FINAL = ((b"", True),)


@dataclass(frozen=True, slots=True)
class CsvTable:
    """An opened CSV.

    `columns` are the header's cells as written, `names` the variable names of them (empty where
    the cell is), `email_index` is where the address stands.
    """

    columns: tuple[str, ...]
    names: tuple[str, ...]
    email_index: int
    separator: str
    _rows: Iterator[tuple[int, list[str]]]

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Return the rows, once: their numbers and cells, as they are.

        Raises:
            InvalidInput: while reading; CSV_NO_ROWS, CSV_NOT_UTF8, CSV_NUL, CSV_UNCLOSED_QUOTE,
                CSV_CELL_TOO_LONG.
        """
        return self._rows


class _BadText(Exception):
    """The text ends here: `problem` is to be told with the row."""

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
    """Read the header of a CSV; the rows follow as they are asked for.

    Raises:
        InvalidInput: CSV_EMPTY, CSV_NO_EMAIL_COLUMN, CSV_DUPLICATE_COLUMN, and what `rows` raises.
    """
    # The module knows one limit for the whole process; its default of 131,072 is too short for us.
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    state = _End()
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
    names = tuple(map(variable_name, columns))
    return CsvTable(columns, names, _email_index(columns, names), separator, _rows(reader, state))


class _End:
    """Whether the line that marks the end has been handed out."""

    __slots__ = ("reached",)

    def __init__(self) -> None:
        self.reached = False

    def mark(self) -> Iterator[str]:
        """Yield the line that marks the end."""
        self.reached = True
        yield _END


def _rows(reader: Iterator[list[str]], state: _End) -> Iterator[tuple[int, list[str]]]:
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
        raise InvalidInput("the CSV has a header and no rows", reason="CSV_NO_ROWS")


def _lines(chunks: Iterator[bytes], state: _End) -> Iterator[str]:
    """Return the lines with their ends, and a last one that marks the end.

    Lines pass through no Python code on their way to csv.
    """
    pieces = _pieces(_texts(chunks))
    lines = chain.from_iterable(io.StringIO(piece, newline="") for piece in pieces)
    return chain(lines, state.mark())


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    """Yield the text cut at line ends.

    Each character is looked at once however long a line is. A CR at the end of a text is kept back:
    it is a line end of its own only if no LF follows.
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
        if tail_length > MAX_CELL_CHARACTERS:
            raise _BadText("CSV_CELL_TOO_LONG", _TOO_LONG, -1)
    rest = "".join(tail) + held
    if rest:
        yield rest


def _texts(chunks: Iterator[bytes]) -> Iterator[str]:
    """Yield the decoded chunks.

    What comes before bad bytes is yielded first, so that the row is known when they are reported.
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
    """Yield `text`, up to the first NUL in it: no text has one, and PostgreSQL takes none."""
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
        f"the bytes {bad} at byte {offset} are no {encoding.upper()}{hint}",
        offset,
    )


def _header_lines(lines: Iterator[str], state: _End) -> tuple[list[str], str]:
    """Return the lines of the header, the first that is not blank, and the separator in it."""
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
        if length > MAX_CELL_CHARACTERS:
            raise _BadText("CSV_CELL_TOO_LONG", _TOO_LONG, -1)
        # A quoted line break: the header goes on. A doubled quote counts twice, so parity holds.
        quotes += line.count('"')
        if quotes % 2 == 0:
            break
    if not header:
        raise InvalidInput("the CSV is empty", reason="CSV_EMPTY")
    if state.reached:
        raise _unclosed_quote("the header")
    return header, separator or _separator("".join(header))


def _separator(header: str) -> str:
    """Return what separates the cells of `header`: what makes an e-mail column, else what is most.

    Only what stands outside quotes counts.
    """
    bare = _QUOTED.sub("", header)
    candidates = sorted(_SEPARATORS, key=bare.count, reverse=True)
    for separator in candidates:
        cells = next(csv.reader(io.StringIO(header, newline=""), delimiter=separator))
        if any(variable_name(cell) in EMAIL_NAMES for cell in cells):
            return separator
    return candidates[0]


def _email_index(columns: Sequence[str], names: Sequence[str]) -> int:
    seen: dict[str, str] = {}
    for column, name in zip(columns, names, strict=True):
        if name and name in seen:
            raise InvalidInput(
                f"two columns have the same name: {_show(seen[name])} and {_show(column)} are both "
                f"{{{{ {name} }}}}",
                reason="CSV_DUPLICATE_COLUMN",
                metadata={"column": name},
            )
        seen[name] = column
    if "email" in names:
        return names.index("email")
    for index, name in enumerate(names):
        if name in EMAIL_NAMES:
            return index
    found = ", ".join(map(_show, columns[:_MAX_SHOWN_COLUMNS]))
    raise InvalidInput(
        f"the CSV has no column `email`; its columns are {found}",
        reason="CSV_NO_EMAIL_COLUMN",
        metadata={"columns": found},
    )


def _unclosed_quote(where: str) -> InvalidInput:
    return InvalidInput(
        f'{where}: a quote (") is opened here and never closed', reason="CSV_UNCLOSED_QUOTE"
    )


def _cell_too_long(where: str) -> InvalidInput:
    return InvalidInput(f"{where}: {_TOO_LONG}", reason="CSV_CELL_TOO_LONG")


def _show(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "...")
