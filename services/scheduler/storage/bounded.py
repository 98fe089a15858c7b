"""Finds the rows of one table that match a filter, with a bounded number of rows read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Any, Final, Generic, TypeVar

from sqlalchemy import ColumnElement, Row, Select, literal, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import InstrumentedAttribute

K = TypeVar("K")

# The number of rows that one search reads, in about 10 ms.
MOST_READ: Final = 5_000
# The number of rows that the first part of a search reads, for each row that is wanted.
_FIRST_PART: Final = 3


@dataclass(frozen=True, slots=True)
class FoundRows(Generic[K]):
    """The rows that a search found, and the key after which the next one continues.

    `reached` is None if there are no more rows, or if as many were found as were wanted.
    """

    rows: Sequence[Row[Any]]
    reached: K | None = None


async def search(
    connection: AsyncConnection,
    rows: Select[Any],
    key: InstrumentedAttribute[K],
    matches: ColumnElement[bool] | None,
    limit: int,
    *,
    descending: bool,
    most: int | None = None,
) -> FoundRows[K]:
    """Return the first `limit` of `rows` that match, in the order of `key`.

    An index must serve the conditions of `rows` in this order. `matches` is the condition on each
    row that is read, at most `most` (None: MOST_READ). If it is None, all match.
    """
    found = await search_by(
        connection, rows, (key,), matches, limit, descending=descending, most=most
    )
    return FoundRows(found.rows, None if found.reached is None else found.reached[0])


async def search_by(
    connection: AsyncConnection,
    rows: Select[Any],
    keys: Sequence[InstrumentedAttribute[Any]],
    matches: ColumnElement[bool] | None,
    limit: int,
    *,
    descending: bool,
    most: int | None = None,
) -> FoundRows[tuple[Any, ...]]:
    """Return the rows as `search` does, in the order of several keys."""
    ordered = rows.order_by(*(key.desc() if descending else key.asc() for key in keys))
    if matches is None:
        return FoundRows((await connection.execute(ordered.limit(limit))).all())
    beyond = lt if descending else gt
    left = most or MOST_READ
    found: list[Row[Any]] = []
    end: tuple[Any, ...] | None = None
    # Most searches find enough among the first rows.
    for part in (min(_FIRST_PART * limit, left), left):
        rest = ordered if end is None else ordered.where(compared(keys, end, beyond))
        last = rest.with_only_columns(*keys).offset(part - 1).limit(1)
        row = (await connection.execute(last)).one_or_none()
        end = None if row is None else tuple(row)
        if end is not None:
            rest = rest.where(compared(keys, end, ge if descending else le))
        wanted = rest.where(matches).limit(limit - len(found))
        found += (await connection.execute(wanted)).all()
        left -= part
        if end is None or len(found) == limit or left <= 0:
            break
    return FoundRows(found, None if len(found) == limit else end)


def compared(
    keys: Sequence[InstrumentedAttribute[Any]],
    place: Sequence[Any],
    comparison: Callable[[Any, Any], ColumnElement[bool]],
) -> ColumnElement[bool]:
    """Return the condition that compares a row with the values of its keys at a place."""
    values = (literal(value, key.expression.type) for key, value in zip(keys, place, strict=True))
    return comparison(tuple_(*keys), tuple_(*values))
