"""From a row as it came to a job as it is stored, or to the rejection that says what is wrong.

A row is rejected for the first problem in this order: its shape, the address, `schedule_time` and
`timezone`, columns that the templates require, the subject, the content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple, Protocol, TypeVar

from outbox_server.services.scheduler.addresses import BadAddress, address_key, check_address
from outbox_server.services.scheduler.csv_reader import EMAIL_NAMES, CsvTable
from outbox_server.services.scheduler.send_times import (
    BadScheduleTime,
    check_time_zone,
    parse_schedule_time,
)
from outbox_server.shared.templates.batch import (
    LINE_BREAK,
    BatchTemplate,
    RenderError,
    encode_variables,
    missing_column,
    variable_name,
)

_BLOCK_SIZE = 5_000
# A cell may be long: memory follows the characters of a block, not its rows.
_BLOCK_CHARACTERS = 4 * 1024 * 1024
_ABSENT = -1
# The names of columns of a caller's own rows, remembered: they repeat from row to row.
_MAX_REMEMBERED_NAMES = 10_000

Raw_contra = TypeVar("Raw_contra", contravariant=True)


class JobRow(NamedTuple):
    """A row that is good. `schedule_time` is UTC, None: the batch decides."""

    row_number: int
    recipient: str
    address_key: str
    schedule_time: datetime | None
    variables: str | None


class RowRejection(NamedTuple):
    """A row that is not. `column` is a variable name; empty: the row as a whole."""

    row_number: int
    column: str
    reason: str
    message: str


class Block(NamedTuple):
    """Some rows, in their order."""

    rows: list[JobRow]
    rejections: list[RowRejection]


class RowPlan(Protocol[Raw_contra]):
    """Knows where in a raw row everything stands."""

    def read(self, number: int, raw: Raw_contra) -> JobRow | RowRejection:
        """Check one row."""


def read_blocks(
    rows: Iterable[tuple[int, Raw_contra]], plan: RowPlan[Raw_contra], block_size: int = _BLOCK_SIZE
) -> Iterator[Block]:
    """Check `rows` (number, raw row) and yield them `block_size` at a time, or fewer.

    The last block has fewer, and so has one of long variables.

    Raises:
        InvalidInput: what `rows` raises.
    """
    good: list[JobRow] = []
    bad: list[RowRejection] = []
    read = plan.read
    characters = 0
    for number, raw in rows:
        row = read(number, raw)
        if isinstance(row, JobRow):
            good.append(row)
            characters += len(row.variables or "")
        else:
            bad.append(row)
        if len(good) + len(bad) >= block_size or characters >= _BLOCK_CHARACTERS:
            yield Block(good, bad)
            good, bad, characters = [], [], 0
    if good or bad:
        yield Block(good, bad)


class CsvPlan:
    """The plan of a CSV: each row is a list of cells, `CsvTable.rows` gives them.

    `variable_names`: what `JobRow.variables` holds, in its order.
    """

    def __init__(self, table: CsvTable, template: BatchTemplate, default_zone: str = "UTC") -> None:
        index_of = {name: index for index, name in enumerate(table.names) if name}
        self._email_index = table.email_index
        self._email_name = table.names[table.email_index]
        # `{{ email }}` is the address, whatever its column is called.
        index_of.setdefault("email", table.email_index)
        self._schedule_time_index = index_of.get("schedule_time", _ABSENT)
        self._zone_index = index_of.get("timezone", _ABSENT)
        self._width = len(table.columns)
        # Cells below nameless columns at the end may be left out.
        self._least_width = max(index_of.values()) + 1
        self.variable_names = tuple(name for name in template.variable_names if name in index_of)
        self._indexes = [index_of[name] for name in self.variable_names]
        self._missing = _first_missing(template, index_of)
        self._checks = _Checks(template, self.variable_names, default_zone)

    def read(self, number: int, raw: list[str]) -> JobRow | RowRejection:
        """Check one row."""
        width = len(raw)
        if width != self._width and (
            width < self._least_width or any(raw[index] for index in range(self._width, width))
        ):
            return RowRejection(
                number, "", "RAGGED_ROW", f"the row has {width} cells, not {self._width}"
            )
        try:
            recipient = check_address(raw[self._email_index])
        except BadAddress as error:
            return RowRejection(number, self._email_name, error.reason, error.message)
        schedule_time = None
        if self._schedule_time_index >= 0 or self._zone_index >= 0:
            try:
                schedule_time = self._checks.schedule_time(
                    raw[self._schedule_time_index] if self._schedule_time_index >= 0 else "",
                    raw[self._zone_index] if self._zone_index >= 0 else "",
                )
            except BadScheduleTime as error:
                return RowRejection(number, error.column, error.reason, error.message)
        if self._missing:
            return RowRejection(number, *self._missing)
        values = [raw[index] for index in self._indexes]
        problem = self._checks.texts(values)
        if problem:
            return RowRejection(number, *problem)
        return JobRow(
            number, recipient, address_key(recipient), schedule_time, encode_variables(values)
        )


class RecipientPlan:
    """The plan of rows that a caller made: the address, and the other columns by name.

    Columns may differ from row to row, and are named as a CSV's. `variable_names`: what
    `JobRow.variables` holds, in its order.
    """

    def __init__(self, template: BatchTemplate, default_zone: str = "UTC") -> None:
        self._template = template
        self.variable_names = template.variable_names
        self._checks = _Checks(template, self.variable_names, default_zone)
        self._names: dict[str, str] = {}

    def read(self, number: int, raw: tuple[str, Mapping[str, str]]) -> JobRow | RowRejection:
        """Check one row."""
        email, columns = raw
        cells: dict[str, str] = {}
        for column, cell in columns.items():
            name = self._name(column)
            if name in EMAIL_NAMES or name in cells:
                return RowRejection(
                    number,
                    name,
                    "DUPLICATE_COLUMN",
                    "the address stands in `email` alone"
                    if name in EMAIL_NAMES
                    else f"two columns are both {{{{ {name} }}}}",
                )
            if name:
                cells[name] = cell
        cells["email"] = email
        try:
            recipient = check_address(email)
            schedule_time = self._checks.schedule_time(
                cells.get("schedule_time", ""), cells.get("timezone", "")
            )
        except BadAddress as error:
            return RowRejection(number, "email", error.reason, error.message)
        except BadScheduleTime as error:
            return RowRejection(number, error.column, error.reason, error.message)
        missing = _first_missing(self._template, cells)
        if missing:
            return RowRejection(number, *missing)
        values = [cells.get(name) for name in self.variable_names]
        problem = self._checks.texts(values)
        if problem:
            return RowRejection(number, *problem)
        return JobRow(
            number, recipient, address_key(recipient), schedule_time, encode_variables(values)
        )

    def _name(self, column: str) -> str:
        name = self._names.get(column)
        if name is None:
            name = variable_name(column)
            if len(self._names) < _MAX_REMEMBERED_NAMES:
                self._names[column] = name
        return name


class _Problem(NamedTuple):
    column: str
    reason: str
    message: str


class _Checks:
    """What is asked of every row, wherever it comes from."""

    def __init__(self, template: BatchTemplate, names: Sequence[str], default_zone: str) -> None:
        self._template = template
        self._names = names
        self._default_zone = default_zone
        self._subject_indexes = [
            index for index, name in enumerate(names) if name in template.subject_names
        ]
        self._content_indexes = [
            index for index, name in enumerate(names) if name in ("body", "html")
        ]

    def schedule_time(self, text: str, zone: str) -> datetime | None:
        """Return the row's own time; a zone is checked even if nothing needs it."""
        if text and not text.isspace():
            return parse_schedule_time(text, zone, self._default_zone)
        if zone and not zone.isspace():
            check_time_zone(zone.strip())
        return None

    def texts(self, values: Sequence[str | None]) -> _Problem | None:
        """Return what is wrong with the texts, as far as it can be known without rendering."""
        broken = ""
        for index in self._subject_indexes:
            if LINE_BREAK.search(values[index] or ""):
                broken = self._names[index]
                break
        # Rendering costs 25 us, so only where there is a doubt: filters may remove the break.
        if broken or self._template.subject_may_break:
            try:
                self._template.render_subject(
                    {
                        name: value
                        for name, value in zip(self._names, values, strict=True)
                        if value is not None
                    }
                )
            except RenderError as error:
                return _Problem(broken or "subject", error.reason, error.message)
        if self._template.content_from_row and not any(
            values[index] for index in self._content_indexes
        ):
            return _Problem("", "NO_CONTENT", "the row has neither `body` nor `html`")
        return None


def _first_missing(template: BatchTemplate, columns: Iterable[str]) -> _Problem | None:
    """Return the first variable that is required and no column, if there is one."""
    for name in sorted(template.required.difference(columns)):
        if name == "subject" and template.subject_from_row:
            return _Problem(
                name, "COLUMN_MISSING", "there is no subject: give one, or a column `subject`"
            )
        return _Problem(name, "COLUMN_MISSING", missing_column(name, columns))
    return None
