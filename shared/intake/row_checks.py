"""The checks of one row: its time, its texts, and the columns that its templates require."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from outbox_server.shared.bounds import MAX_CELL, MAX_COLUMN_NAME, MAX_COLUMNS
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.intake.csv_reader import ZONE_NAMES, CsvTable
from outbox_server.shared.intake.schedule_times import check_time_zone, parse_schedule_time
from outbox_server.shared.quoting import quoted, shortened
from outbox_server.shared.templates.batch import (
    LINE_BREAK,
    BatchTemplate,
    RenderError,
    missing_column,
)
from outbox_server.shared.templates.checking import SHORT_CELL, doubtful_column


class Problem(NamedTuple):
    """What is wrong with a row. `column` is a variable name; empty means the row as a whole."""

    column: str
    reason: str
    message: str


class RowChecks:
    """The checks of the time and the texts of a row, for all rows of a batch."""

    def __init__(self, template: BatchTemplate, names: Sequence[str], default_zone: str) -> None:
        """`names` are the variable names of the values that `texts` gets."""
        self._template = template
        self._checks_head = template.checks_head
        self._names = names
        self._default_zone = default_zone
        # The subject of a Liquid template is rendered with the rest of the mail.
        self._subject_indexes = [
            index
            for index, name in enumerate(names)
            if name in template.subject_names and not template.subject_is_liquid
        ]
        self._content_indexes = [
            index for index, name in enumerate(names) if name in ("body", "html")
        ]

    def schedule_time(self, text: str, zone: str) -> datetime | None:
        """Return the row's own time, or None. The zone is checked even if it is not needed."""
        if text and not text.isspace():
            return parse_schedule_time(text, zone, self._default_zone)
        if zone and not zone.isspace():
            check_time_zone(zone.strip())
        return None

    def texts(self, values: Sequence[str | None]) -> Problem | None:
        """Return the first problem with the subject or the content, or None."""
        doubtful = self._template.subject_breaks
        for index in self._subject_indexes:
            cell = values[index] or ""
            if len(cell) > SHORT_CELL or LINE_BREAK.search(cell):
                doubtful = True
                break
        # Whether a subject is too long, or has a line break, can be seen only when it is rendered.
        if doubtful:
            try:
                self._template.render_subject(
                    {
                        name: value
                        for name, value in zip(self._names, values, strict=True)
                        if value is not None
                    }
                )
            except RenderError as error:
                column = doubtful_column(self._template, self._names, values)
                return Problem(column, error.reason, error.message)
        if self._checks_head:
            try:
                self._template.render_head(
                    {
                        name: value
                        for name, value in zip(self._names, values, strict=True)
                        if value is not None
                    }
                )
            except RenderError as error:
                return Problem(error.column, error.reason, error.message)
        if self._template.content_from_row and not any(
            values[index] for index in self._content_indexes
        ):
            return Problem("", "NO_CONTENT", "the row has neither `body` nor `html`")
        return None


def oversized(columns: Mapping[str, str]) -> Problem | None:
    """Return the problem if a row has too many columns, or one that is too long, or None."""
    if len(columns) > MAX_COLUMNS:
        return Problem(
            "",
            "TOO_MANY_COLUMNS",
            f"a row must have at most {MAX_COLUMNS:,} columns (got {len(columns):,})",
        )
    for column, cell in columns.items():
        if len(column) > MAX_COLUMN_NAME:
            return Problem(
                "",
                "COLUMN_NAME_TOO_LONG",
                f"the name of a column must have at most {MAX_COLUMN_NAME} characters "
                f"(got {len(column):,}): {quoted(column)}",
            )
        if len(cell) > MAX_CELL:
            return Problem(
                shortened(column),
                "CELL_TOO_LONG",
                f"a cell must have at most {MAX_CELL:,} characters (got {len(cell):,})",
            )
    return None


def check_used(
    table: CsvTable, template: BatchTemplate, more: Iterable[str], *, timed: bool
) -> None:
    """Check that no name that is used belongs to two columns.

    Raises:
        InvalidInput: CSV_DUPLICATE_COLUMN.
    """
    used = {*template.variable_names, *more} - {"email"}
    if timed:
        used.update(("schedule_time", *ZONE_NAMES))
    first: dict[str, str] = {}
    for column, name in zip(table.columns, table.names, strict=True):
        if name in used and name in first:
            raise InvalidInput(
                f"the columns {quoted(first[name])} and {quoted(column)} have the same variable "
                f"name, `{name}`, which is used; rename one",
                reason="CSV_DUPLICATE_COLUMN",
                metadata={"column": name},
            )
        first.setdefault(name, column)
    if timed and first.keys() >= set(ZONE_NAMES):
        zones = [quoted(first[name]) for name in ZONE_NAMES]
        raise InvalidInput(
            f"the columns {zones[0]} and {zones[1]} both give the time zone of a row; keep one",
            reason="CSV_DUPLICATE_COLUMN",
            metadata={"column": ZONE_NAMES[1]},
        )


def first_missing(template: BatchTemplate, columns: Iterable[str]) -> Problem | None:
    """Return the problem for the first required variable without a column, or None."""
    for name in sorted(template.required.difference(columns)):
        if name == "subject" and template.subject_from_row:
            return Problem(
                name,
                "COLUMN_MISSING",
                "there is no subject: set options.subject, or add the column",
            )
        if len(name) > MAX_COLUMN_NAME:
            # Every rejection repeats this text, and a template has room for a name of 256 KiB.
            return Problem(
                shortened(name),
                "COLUMN_MISSING",
                f"the template needs a column whose name has {len(name):,} characters; the name of "
                f"a column has at most {MAX_COLUMN_NAME}",
            )
        return Problem(name, "COLUMN_MISSING", missing_column(name, columns))
    return None
