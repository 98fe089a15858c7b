"""Divides work into parts of bounded cost, because Redis runs one script at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def parts_by_cost(
    items: Iterable[T], cost_of: Callable[[T], int], *, most: int
) -> Iterator[Sequence[T]]:
    """Return the items in parts that end with the item that reaches the cost `most`."""
    part: list[T] = []
    cost = 0
    for item in items:
        part.append(item)
        cost += cost_of(item)
        if cost >= most:
            yield part
            part, cost = [], 0
    if part:
        yield part
