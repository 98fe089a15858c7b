"""Selects the results of a list that are in memory, because they are few."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import eq, ge, gt, le, lt, ne
from typing import Any, Final, TypeVar

from outbox_server.shared.filters.fields import FieldTest, Filter, Value
from outbox_server.shared.filters.grammar import AllOf, AnyOf, Negation

T = TypeVar("T")

OPERATORS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "=": eq,
    "!=": ne,
    "<": lt,
    "<=": le,
    ">": gt,
    ">=": ge,
}


def selected(
    found: Iterable[T], tree: Filter | None, values: Mapping[str, Callable[[T], Value]]
) -> list[T]:
    """Return what matches the filter. `values` read the fields; an unset one is None."""
    return [each for each in found if tree is None or _matches(tree, each, values)]


def _matches(tree: Filter, each: T, values: Mapping[str, Callable[[T], Value]]) -> bool:
    match tree:
        case AllOf(terms):
            return all(_matches(term, each, values) for term in terms)
        case AnyOf(terms):
            return any(_matches(term, each, values) for term in terms)
        case Negation(term):
            return not _matches(term, each, values)
        case FieldTest():
            value = values[tree.field](each)
            # An unset field matches only `!=`.
            if value is None or tree.value is None:
                return tree.operator == "!="
            return bool(OPERATORS[tree.operator](value, tree.value))
