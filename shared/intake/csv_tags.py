"""Finds the columns of a CSV that have the caller's ids and labels of jobs. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.intake.tags import RawTags
from outbox_server.shared.quoting import quoted
from outbox_server.shared.templates.batch import variable_name

_ABSENT: Final = -1


def find_column(names: Sequence[str], column: str, option: str) -> int:
    """Return the index of a column that an option names, as the header or by its variable name.

    Raises:
        InvalidInput: NAME_COLUMN_INVALID, EXTERNAL_ID_COLUMN_INVALID, LABEL_COLUMNS_INVALID.
    """
    name = variable_name(column)
    if name not in names:
        raise InvalidInput.field(
            f"options.{option}",
            f"the CSV has no column {quoted(column)}",
            reason=f"{option.upper()}_INVALID",
        )
    return names.index(name)


class CsvTags:
    """Reads the id and the labels of a row. `used` are the variable names of their columns."""

    def __init__(self, names: Sequence[str], id_column: str, label_columns: Sequence[str]) -> None:
        """`names` are the variable names of all columns. The others are as the caller wrote them.

        Raises:
            InvalidInput: EXTERNAL_ID_COLUMN_INVALID, LABEL_COLUMNS_INVALID: a column is missing.
        """
        self.id_column = variable_name(id_column)
        self._id_index = _ABSENT
        if id_column:
            self._id_index = find_column(names, id_column, "external_id_column")
        self._labels = [
            (variable_name(column), find_column(names, column, "label_columns"))
            for column in label_columns
        ]
        self.used = frozenset({self.id_column, *(key for key, _ in self._labels)}) - {""}

    def read(self, raw: Sequence[str]) -> RawTags:
        """Return the id and the labels of a row."""
        cells = ((key, raw[index].strip()) for key, index in self._labels)
        external_id = raw[self._id_index].strip() if self._id_index >= 0 else ""
        return RawTags(external_id, {key: cell for key, cell in cells if cell})
