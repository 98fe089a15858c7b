"""Compares cells that are numbers as numbers.

All values of a row are texts, and Liquid does not compare a text with a number. But templates mean
numbers: `{% if points > 100 %}`. So a text that is a number counts as a number when it is compared
with one. So do two such texts, unless they are compared for equality.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

from liquid.builtin.expressions.logical import (
    EqExpression,
    GeExpression,
    GtExpression,
    LeExpression,
    LtExpression,
    NeExpression,
    _eq,
)
from liquid.builtin.expressions.path import Path
from liquid.context import RenderContext
from liquid.expression import Expression
from liquid.undefined import is_undefined

from outbox_server.shared.templates.wording import TemplateFault

# Numbers without exponent, and short, because the time to convert digits grows with the square of
# their number.
_NUMBER: Final = re.compile(
    r"\s*[+-]?(?:\d{1,30}(?P<fraction>\.\d{0,30})?|(?P<below>\.\d{1,30}))\s*", re.ASCII
)
_LONGEST: Final = 100


def equal(left: object, right: object) -> bool:
    """Return whether two values are equal for `==`, `!=` and `when`."""
    if _is_number(left) and isinstance(right, str):
        left, right = right, left
    if isinstance(left, str) and _is_number(right):
        number = number_of(left)
        return number is not None and number == right
    return _eq(left, right)


class _Equal(EqExpression):
    __slots__ = ()

    def evaluate(self, context: RenderContext) -> object:
        return equal(self.left.evaluate(context), self.right.evaluate(context))


class _NotEqual(NeExpression):
    __slots__ = ()

    def evaluate(self, context: RenderContext) -> object:
        return not equal(self.left.evaluate(context), self.right.evaluate(context))


class _Less(LtExpression):
    __slots__ = ()

    def evaluate(self, context: RenderContext) -> object:
        return _ordered(self, operator.lt, context)


class _LessOrEqual(LeExpression):
    __slots__ = ()

    def evaluate(self, context: RenderContext) -> object:
        return _ordered(self, operator.le, context)


class _Greater(GtExpression):
    __slots__ = ()

    def evaluate(self, context: RenderContext) -> object:
        return _ordered(self, operator.gt, context)


class _GreaterOrEqual(GeExpression):
    __slots__ = ()

    def evaluate(self, context: RenderContext) -> object:
        return _ordered(self, operator.ge, context)


_OURS: Final[dict[type[Expression], type[Expression]]] = {
    EqExpression: _Equal,
    NeExpression: _NotEqual,
    LtExpression: _Less,
    LeExpression: _LessOrEqual,
    GtExpression: _Greater,
    GeExpression: _GreaterOrEqual,
}


def compare_as_numbers(expression: Expression) -> None:
    """Replace a comparison of a parsed template by one of ours."""
    ours = _OURS.get(type(expression))
    if ours is not None:
        expression.__class__ = ours


def _ordered(
    expression: Any, compare: Callable[[Any, Any], bool], context: RenderContext
) -> object:
    left, right = expression.left.evaluate(context), expression.right.evaluate(context)
    if left is None or right is None or is_undefined(left) or is_undefined(right):
        return False
    if isinstance(left, str) and isinstance(right, str):
        numbers = number_of(left), number_of(right)
        return compare(left, right) if None in numbers else compare(*numbers)
    for value, other, side in (
        (left, right, expression.left),
        (right, left, expression.right),
    ):
        if isinstance(value, str) and _is_number(other):
            number = number_of(value)
            if number is None:
                raise _not_a_number(side, value, expression)
            return compare(number, right) if value is left else compare(left, number)
    if _is_number(left) and _is_number(right):
        return compare(left, right)
    raise TemplateFault(f"`{expression}` compares values of two kinds", token=expression.token)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def number_of(text: str) -> int | float | None:
    """Return the number that a text is, or None."""
    found = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None:
        return None
    return float(text) if found["fraction"] or found["below"] else int(text)


def _not_a_number(side: Expression, value: str, expression: Any) -> TemplateFault:
    """Return the error of a text that is not a number. It does not repeat the cell."""
    name = side.head() if isinstance(side, Path) else ""
    column = name if isinstance(name, str) else ""
    what = f"`{column}`" if column else "a text"
    is_what = "not a number such as 12 or 12.5" if value.strip() else "empty"
    return TemplateFault(
        f"{what} is {is_what}, so it cannot be compared with a number",
        token=expression.token,
        column=column,
    )
