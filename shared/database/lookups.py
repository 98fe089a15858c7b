"""Joins of a large table with few rows, which PostgreSQL can only execute by looking rows up."""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import ColumnElement, any_
from sqlalchemy.dialects.postgresql import array


def is_looked_up(column: Any, value: Any) -> ColumnElement[bool]:
    """Return `column = value`, for an indexed column of a large table and a column of few rows.

    With a plain `=`, PostgreSQL may read the whole table and compare each of its rows with each of
    the few. It does so while its statistics are those of an empty table: ANALYZE ran after all rows
    had been removed, and not yet after a large batch. Then a change of 8,000 among 24,000 jobs took
    27 s. PostgreSQL does not merge or hash rows by the elements of an array.
    """
    return cast(ColumnElement[bool], column == any_(array([value])))
