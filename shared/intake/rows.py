"""Converts each raw row to a job, or to a rejection that says what is wrong.

A row is rejected for the first problem in this order: its number of cells, the address,
`schedule_time` and `time_zone`, columns that the templates require, the subject, the other headers,
the content, the caller's id and labels. A column that nothing uses is never a problem.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, Protocol, TypeVar

from outbox_server.shared.bounds import EXTERNAL_ID
from outbox_server.shared.intake.addresses import BadAddress, address_key, check_address
from outbox_server.shared.intake.csv_reader import ZONE_NAMES, CsvTable
from outbox_server.shared.intake.csv_tags import CsvTags, find_column
from outbox_server.shared.intake.row_checks import (
    Problem,
    RowChecks,
    check_used,
    first_missing,
    oversized,
)
from outbox_server.shared.intake.schedule_times import BadScheduleTime
from outbox_server.shared.intake.tags import BadTag, RawTags, RowTags
from outbox_server.shared.reading_turns import pass_on
from outbox_server.shared.templates.batch import (
    BatchTemplate,
    encode_variables,
    variable_name,
)

_BLOCK_SIZE = 5_000
# How many rows are read, in about 1 ms, before the thread lets others read.
_ROWS_AT_ONCE = 100
# The maximum number of characters of a block. It limits memory, because a cell may be long.
_BLOCK_CHARACTERS = 4 * 1024 * 1024
_ABSENT = -1
# The number of column names whose variable names are cached, since rows repeat the same columns.
_MAX_CACHED_NAMES = 10_000
# Columns of a structured row that would hold its address, which belongs in `email`.
EMAIL_NAMES = frozenset({"email", "e_mail", "email_address", "e_mail_address"})
_MAYBE_EMAIL_NAMES = frozenset({"recipient", "to"})

Raw_contra = TypeVar("Raw_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class ReadingRules:
    """How rows are read.

    `special_domains` accepts addresses in domains of private networks, such as `.local`.
    """

    default_zone: str = "UTC"
    email_column: str = ""
    skip_lines: int = 0
    special_domains: bool = True
    # As the caller wrote them; empty means none.
    name_column: str = ""
    external_id_column: str = ""
    label_columns: tuple[str, ...] = ()


_RULES = ReadingRules()


class JobRow(NamedTuple):
    """An accepted row. `schedule_time` is in UTC; None means that the batch sets the time."""

    row_number: int
    recipient: str
    address_key: str
    schedule_time: datetime | None
    variables: str | None
    tags: RowTags | None = None


class RawRow(NamedTuple):
    """A structured row as the caller gave it."""

    email: str
    columns: Mapping[str, str]
    external_id: str = ""
    labels: Mapping[str, str] = {}


class RowRejection(NamedTuple):
    """A rejected row. `column` is a variable name; empty means the row as a whole."""

    row_number: int
    column: str
    reason: str
    message: str


class Block(NamedTuple):
    """Consecutive rows, in their order."""

    rows: list[JobRow]
    rejections: list[RowRejection]


class RowPlan(Protocol[Raw_contra]):
    """Knows where the cells of a raw row are, and checks the row."""

    def read(self, number: int, raw: Raw_contra) -> JobRow | RowRejection:
        """Check one row."""


def read_blocks(
    rows: Iterable[tuple[int, Raw_contra]], plan: RowPlan[Raw_contra], block_size: int = _BLOCK_SIZE
) -> Iterator[Block]:
    """Check `rows` (number, raw row) and yield them in blocks of `block_size` rows.

    The last block may be shorter, and so may a block with long variables.

    Raises:
        InvalidInput: what `rows` raises.
    """
    good: list[JobRow] = []
    bad: list[RowRejection] = []
    read = plan.read
    characters = 0
    until_pause = _ROWS_AT_ONCE
    for number, raw in rows:
        until_pause -= 1
        if not until_pause:
            until_pause = _ROWS_AT_ONCE
            pass_on()
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
    """The plan of a CSV, whose rows are lists of cells from `CsvTable.rows`.

    `variable_names` has the names of the values in `JobRow.variables`, in order.
    """

    def __init__(
        self, table: CsvTable, template: BatchTemplate, rules: ReadingRules = _RULES
    ) -> None:
        """Use the columns of `table`.

        Raises:
            InvalidInput: CSV_DUPLICATE_COLUMN: two columns have a name that is used.
        """
        index_of: dict[str, int] = {}
        for index, name in enumerate(table.names):
            index_of.setdefault(name, index)
        index_of.pop("", None)
        # `{{ email }}` is the address, whatever its column is called.
        index_of["email"] = table.email_index
        self._email_index = table.email_index
        self._email_name = table.names[table.email_index]
        self._special_domains = rules.special_domains
        self._schedule_time_index = index_of.get("schedule_time", _ABSENT)
        self._zone_name = next((name for name in ZONE_NAMES if name in index_of), "")
        self._zone_index = index_of.get(self._zone_name, _ABSENT)
        self._width = len(table.columns)
        # Cells of nameless columns at the end may be missing.
        self._least_width = max(index for index, name in enumerate(table.names) if name) + 1
        self.variable_names = tuple(name for name in template.variable_names if name in index_of)
        self._indexes = [index_of[name] for name in self.variable_names]
        self._missing = first_missing(template, index_of)
        self._tags = CsvTags(table.names, rules.external_id_column, rules.label_columns)
        self._has_tags = bool(self._tags.used)
        self._checks = RowChecks(template, self.variable_names, rules.default_zone)
        if rules.name_column:
            find_column(table.names, rules.name_column, "name_column")
        check_used(table, template, self._tags.used, timed=self._schedule_time_index >= 0)

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
            recipient = check_address(raw[self._email_index], special_domains=self._special_domains)
        except BadAddress as error:
            return RowRejection(number, self._email_name, error.reason, error.message)
        schedule_time = None
        # Without a column `schedule_time`, nothing uses a zone: it may be any text.
        if self._schedule_time_index >= 0:
            try:
                schedule_time = self._checks.schedule_time(
                    raw[self._schedule_time_index],
                    raw[self._zone_index] if self._zone_index >= 0 else "",
                )
            except BadScheduleTime as error:
                return _bad_time(number, error, self._zone_name)
        if self._missing:
            return RowRejection(number, *self._missing)
        values = [raw[index] for index in self._indexes]
        problem = self._checks.texts(values)
        if problem:
            return RowRejection(number, *problem)
        key = address_key(recipient)
        row = JobRow(number, recipient, key, schedule_time, encode_variables(values))
        tags = self._tags.read(raw) if self._has_tags else None
        return row if tags is None else _tagged(row, tags, self._tags.id_column)


class RecipientPlan:
    """The plan of structured rows: the address, and the other columns by name.

    Columns may differ from row to row. Their names become variable names as those of a CSV do.
    `variable_names` has the names of the values in `JobRow.variables`, in order.
    """

    def __init__(self, template: BatchTemplate, rules: ReadingRules = _RULES) -> None:
        self._template = template
        self.variable_names = template.variable_names
        self._special_domains = rules.special_domains
        self._checks = RowChecks(template, self.variable_names, rules.default_zone)
        self._used = frozenset((*template.variable_names, "schedule_time"))
        self._names: dict[str, str] = {}

    def read(self, number: int, raw: RawRow) -> JobRow | RowRejection:
        """Check one row."""
        email, columns, external_id, labels = raw
        cells: dict[str, str] = {}
        problem = oversized(columns) or self._collect(columns, cells)
        if problem:
            return RowRejection(number, *problem)
        cells["email"] = email
        zone_name = next((name for name in ZONE_NAMES if name in cells), "")
        schedule_time = None
        try:
            recipient = check_address(email, special_domains=self._special_domains)
            if "schedule_time" in cells:
                schedule_time = self._checks.schedule_time(
                    cells["schedule_time"], cells.get(zone_name, "")
                )
        except BadAddress as error:
            return RowRejection(number, "email", error.reason, error.message)
        except BadScheduleTime as error:
            return _bad_time(number, error, zone_name)
        missing = first_missing(self._template, cells)
        if missing:
            return RowRejection(number, *missing)
        values = [cells.get(name) for name in self.variable_names]
        problem = self._checks.texts(values)
        if problem:
            return RowRejection(number, *problem)
        key = address_key(recipient)
        row = JobRow(number, recipient, key, schedule_time, encode_variables(values))
        return _tagged(row, RawTags(external_id, labels))

    def _collect(self, columns: Mapping[str, str], cells: dict[str, str]) -> Problem | None:
        """Add the cells to `cells` by variable name, or return the problem of a column."""
        for column, cell in columns.items():
            name = self._name(column)
            if name in EMAIL_NAMES or (name in _MAYBE_EMAIL_NAMES and "@" in cell):
                return Problem(
                    name, "DUPLICATE_COLUMN", "the address belongs in `email`, not in a column"
                )
            if name in cells and (name in self._used or name in ZONE_NAMES):
                return Problem(
                    name, "DUPLICATE_COLUMN", f"two columns have the variable name `{name}`"
                )
            if name:
                cells[name] = cell
        if "schedule_time" in cells and all(name in cells for name in ZONE_NAMES):
            return Problem(
                ZONE_NAMES[1],
                "DUPLICATE_COLUMN",
                "`time_zone` and `timezone` both give the time zone; keep one",
            )
        return None

    def _name(self, column: str) -> str:
        name = self._names.get(column)
        if name is None:
            name = variable_name(column)
            if len(self._names) < _MAX_CACHED_NAMES:
                self._names[column] = name
        return name


def _bad_time(number: int, error: BadScheduleTime, zone_name: str) -> RowRejection:
    """Reject a row for its time. `zone_name` is what the row calls its column `time_zone`."""
    column = zone_name if zone_name and error.column == "time_zone" else error.column
    return RowRejection(number, column, error.reason, error.message)


def _tagged(row: JobRow, tags: RawTags, id_column: str = "") -> JobRow | RowRejection:
    """Return the row with its id and labels, or the row's rejection. `id_column` has the ids."""
    try:
        checked = tags.checked()
    except BadTag as error:
        column = id_column if error.reason == EXTERNAL_ID.reason else ""
        return RowRejection(row.row_number, column, error.reason, error.message)
    return row if checked is None else row._replace(tags=checked)
