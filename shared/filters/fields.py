"""Checks a filter against the fields of a list, and finds out what it implies."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Final, TypeAlias

from outbox_server.shared.filters.grammar import (
    AllOf,
    AnyOf,
    Comparison,
    Negation,
    Tree,
    leaves,
    shown,
    wrong_filter,
)
from outbox_server.shared.intake.addresses import BadAddress, check_address
from outbox_server.shared.intake.tags import is_label_key

Value: TypeAlias = int | str | datetime | None


class FieldKind(Enum):
    """The kind of a field's values, in the words of an error message."""

    STATE = "a name"
    FLAG = "true or false"
    ID = "an id"
    ADDRESS = "an e-mail address"
    TEXT = "a text"
    NUMBER = "a whole number"
    TIME = "a time"
    # The field's name is followed by a key: `labels.campaign`.
    LABELS = "a label"


_EQUALITY: Final = ("=", "!=")
_ORDERED: Final = (*_EQUALITY, "<", "<=", ">", ">=")
_OPERATORS: Final = {
    kind: _ORDERED if kind in (FieldKind.NUMBER, FieldKind.TIME) else _EQUALITY
    for kind in FieldKind
}
_NUMBER: Final = re.compile(r"-?[0-9]{1,18}", re.ASCII)
# Ids as the server writes them.
_ID: Final = re.compile(r"[1-9][0-9]{0,18}", re.ASCII)
_LARGEST_ID: Final = 2**63 - 1
_TIME: Final = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:[0-5]\d)", re.ASCII
)


@dataclass(frozen=True, slots=True)
class FilterField:
    """A field that filters may name.

    `states` has the numbers of states by their names, which may also begin with `prefix`.
    """

    kind: FieldKind
    states: Mapping[str, int] = field(default_factory=dict)
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class FieldTest:
    """A checked comparison. `value` is None if no row can have the value, such as a wrong id.

    `field` contains the key of a label.
    """

    field: str
    operator: str
    value: Value

    @property
    def key(self) -> str:
        """The key of the label that is compared."""
        return self.field.partition(".")[2]


Filter: TypeAlias = Tree[FieldTest]


def check_filter(tree: Tree[Comparison] | None, fields: Mapping[str, FilterField]) -> Filter | None:
    """Return the tree with typed values.

    Raises:
        InvalidInput: FILTER_INVALID: a field is unknown, or has not this operator or value.
    """
    return None if tree is None else _checked(tree, fields)


def _checked(tree: Tree[Comparison], fields: Mapping[str, FilterField]) -> Filter:
    match tree:
        case AllOf(terms):
            return AllOf(tuple(_checked(term, fields) for term in terms))
        case AnyOf(terms):
            return AnyOf(tuple(_checked(term, fields) for term in terms))
        case Negation(term):
            return Negation(_checked(term, fields))
        case Comparison():
            return _test(tree, fields)


def _test(comparison: Comparison, fields: Mapping[str, FilterField]) -> FieldTest:
    name, _, key = comparison.field.partition(".")
    field = fields.get(name)
    if field is not None and (field.kind is FieldKind.LABELS) != bool(key):
        field = None
    if field is None:
        known = ", ".join(sorted(map(_shown_name, fields, fields.values())))
        raise wrong_filter(
            comparison.field_at,
            f"there is no field {shown(comparison.field)} here; fields are {known}",
        )
    if key and not is_label_key(key):
        raise wrong_filter(
            comparison.field_at,
            f"{shown(key)} cannot be the key of a label: it is a lower-case letter, then "
            "lower-case letters, digits, `_` and `-`",
        )
    allowed = _OPERATORS[field.kind]
    if comparison.operator not in allowed:
        raise wrong_filter(
            comparison.field_at,
            f"`{comparison.field}` is {field.kind.value}, and has no operator "
            f"{comparison.operator}; use {' or '.join(allowed)}",
        )
    return FieldTest(comparison.field, comparison.operator, _value(comparison, field))


def _shown_name(name: str, field: FilterField) -> str:
    return f"{name}.KEY" if field.kind is FieldKind.LABELS else name


def _value(comparison: Comparison, field: FilterField) -> Value:
    text, at = comparison.value, comparison.value_at
    found: Value = text
    match field.kind:
        case FieldKind.STATE:
            found = _state(text, at, field)
        case FieldKind.FLAG:
            found = _flag(text, at)
        case FieldKind.ID:
            found = int(text) if _ID.fullmatch(text) and int(text) <= _LARGEST_ID else None
        case FieldKind.ADDRESS:
            found = stored_address(text)
        case FieldKind.NUMBER:
            if not _NUMBER.fullmatch(text):
                raise wrong_filter(at, f"{shown(text)} is not a whole number")
            found = int(text)
        case FieldKind.TIME:
            found = _time(text, at)
    return found


def stored_address(text: str) -> str | None:
    """Return an address in the form in which addresses are stored; None if it is not one."""
    try:
        return check_address(text)
    except BadAddress:
        return None


def _state(text: str, at: int, field: FilterField) -> int:
    state = field.states.get(text.upper().removeprefix(field.prefix))
    if state is None:
        raise wrong_filter(at, f"{shown(text)} is not one of {', '.join(field.states)}")
    return state


def _flag(text: str, at: int) -> bool:
    # Truth values as AIP-160 and JSON write them, in any case.
    flag = {"true": True, "false": False}.get(text.lower())
    if flag is None:
        raise wrong_filter(at, f"{shown(text)} is neither true nor false")
    return flag


def _time(text: str, at: int) -> datetime:
    if _TIME.fullmatch(text):
        with suppress(ValueError, OverflowError):
            return datetime.fromisoformat(text.upper()).astimezone(UTC)
    raise wrong_filter(
        at,
        f"{shown(text)} is not a time with an offset, such as 2026-12-24T18:00:00Z or "
        "2026-12-24T19:00:00+01:00",
    )


def both(one: Filter | None, other: Filter | None) -> Filter | None:
    """Return the filter that matches what both match. None matches everything."""
    if one is None or other is None:
        return other if one is None else one
    return AllOf((*_terms(one), *_terms(other)))


def _terms(tree: Filter) -> tuple[Filter, ...]:
    """Return the terms that must all match."""
    if isinstance(tree, AllOf):
        return tuple(inner for term in tree.terms for inner in _terms(term))
    return (tree,)


def required(tree: Filter | None) -> tuple[Filter, ...]:
    """Return the terms that must all match: none for a filter that matches everything."""
    return () if tree is None else _terms(tree)


def required_value(tree: Filter | None, field: str) -> tuple[bool, Value]:
    """Return whether every match has one value of `field`, and that value."""
    for term in required(tree):
        if isinstance(term, FieldTest) and (term.field, term.operator) == (field, "="):
            return True, term.value
    return False, None


def possible_values(tree: Filter | None, field: str, values: frozenset[int]) -> frozenset[int]:
    """Return the `values` that the state `field` of a matching resource can have."""
    if tree is None:
        return values
    return frozenset(value for value in values if _may_match(tree, field, value)[0])


def _may_match(tree: Filter, field: str, value: int) -> tuple[bool, bool]:
    """Return whether a row with this value may match, and whether it may not."""
    match tree:
        case AllOf(terms):
            parts = [_may_match(term, field, value) for term in terms]
            return all(may for may, _ in parts), any(may_not for _, may_not in parts)
        case AnyOf(terms):
            parts = [_may_match(term, field, value) for term in terms]
            return any(may for may, _ in parts), all(may_not for _, may_not in parts)
        case Negation(term):
            may, may_not = _may_match(term, field, value)
            return may_not, may
        case FieldTest():
            if tree.field != field:
                return True, True
            same = (tree.value == value) == (tree.operator == "=")
            return same, not same


def names_only(tree: Filter, is_named: Callable[[str], bool]) -> bool:
    """Return whether all fields of the filter are of this kind."""
    return all(is_named(test.field) for test in leaves(tree))


def earliest(tree: Filter | None, field: str) -> datetime | None:
    """Return a time before which no match has its `field`; None if there is no such time."""
    found = [value for operator, value in _times(tree, field) if operator in (">", ">=", "=")]
    return max(found, default=None)


def latest(tree: Filter | None, field: str) -> datetime | None:
    """Return a time after which no match has its `field`; None if there is no such time."""
    found = [value for operator, value in _times(tree, field) if operator in ("<", "<=", "=")]
    return min(found, default=None)


def _times(tree: Filter | None, field: str) -> list[tuple[str, datetime]]:
    return [
        (term.operator, term.value)
        for term in required(tree)
        if isinstance(term, FieldTest) and term.field == field and isinstance(term.value, datetime)
    ]
