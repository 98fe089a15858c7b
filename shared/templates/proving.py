"""Proves that a template can be rendered, so that few rows must be rendered at intake.

The proof is a sufficient condition, with a large margin: a template of a few safe constructs, cells
that are numbers where they are compared with numbers, and so little text that no limit is near. A
row for which it fails is rendered, which decides. So most rows of most templates cost microseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from liquid.ast import BlockNode, ConditionalBlockNode
from liquid.builtin.content import ContentNode
from liquid.builtin.expressions import (
    BooleanExpression,
    FilteredExpression,
    Path,
    PositionalArgument,
    StringLiteral,
)
from liquid.builtin.expressions.logical import (
    ContainsExpression,
    EqExpression,
    GeExpression,
    GtExpression,
    LeExpression,
    LogicalAndExpression,
    LogicalOrExpression,
    LtExpression,
    NeExpression,
)
from liquid.builtin.expressions.primitive import (
    FalseLiteral,
    FloatLiteral,
    IntegerLiteral,
    Nil,
    TrueLiteral,
)
from liquid.builtin.output import OutputNode
from liquid.builtin.tags.comment_tag import CommentNode
from liquid.builtin.tags.doc_tag import DocNode
from liquid.builtin.tags.if_tag import IfNode
from liquid.builtin.tags.unless_tag import UnlessNode

from outbox_server.shared.message_size import utf8_size
from outbox_server.shared.templates.source import RenderingProof
from outbox_server.shared.templates.variables import BUILT_IN

if TYPE_CHECKING:
    from liquid.ast import Node
    from liquid.builtin.expressions.filtered import Filter
    from liquid.context import RenderContext
    from liquid.expression import Expression

# The text of `now`, or of one directive of a date.
_CLOCK: Final = 32
# Filters that turn an ASCII text into one that is not longer, and fail for no text; with the
# numbers of their arguments.
_PLAIN_FILTERS: Final = {
    **dict.fromkeys(("capitalize", "downcase", "upcase", "strip", "lstrip", "rstrip"), (0,)),
    **dict.fromkeys(("append", "prepend"), (1,)),
    "default": (0, 1),
}
# Filters that calculate with numbers, and the most of them in a row: so few that no result is near
# the largest number.
_ARITHMETIC: Final = {
    **dict.fromkeys(("plus", "minus", "times", "divided_by", "modulo"), 1),
    **dict.fromkeys(("round", "ceil", "floor", "abs"), 0),
}
_MOST_STEPS: Final = 4
# The maximum number of characters that one of them adds to a number.
_NUMBER: Final = 64
_ORDERED: Final = (LtExpression, LeExpression, GtExpression, GeExpression)
_NUMBERS: Final = (IntegerLiteral, FloatLiteral)
_LITERALS: Final = (StringLiteral, IntegerLiteral, FloatLiteral, TrueLiteral, FalseLiteral, Nil)
_SIMPLE_DATE: Final = re.compile(r"(?:[^%]|%[YmdHMSyjBbAaeIp%])*")
_DIRECTIVE: Final = re.compile("%")


class _NotProvableError(Exception):
    """The template has a construct that may fail."""


def prove(nodes: Sequence[Node], source: str, static: RenderContext) -> RenderingProof | None:
    """Return what a row needs so that rendering certainly succeeds; None if it cannot be proved."""
    walk = _Proof(static)
    try:
        walk.nodes(nodes)
    except (_NotProvableError, RecursionError):
        return None
    # Three, because a letter of a literal may become three in upper case.
    size = len(source) if source.isascii() else 3 * utf8_size(source)
    return RenderingProof(frozenset(walk.numbers), walk.uses, size + walk.more)


class _Proof:
    def __init__(self, static: RenderContext) -> None:
        self.numbers: set[str] = set()
        self.uses = 0
        self.more = 0
        self._static = static

    def nodes(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if isinstance(node, ContentNode | CommentNode | DocNode):
                continue
            if type(node) is BlockNode or isinstance(
                node, IfNode | UnlessNode | ConditionalBlockNode
            ):
                for expression in node.expressions():
                    self._condition(expression)
                self.nodes(node.children(self._static, include_partials=False))
            elif isinstance(node, OutputNode):
                self._output(node.expression)
            else:
                raise _NotProvableError

    def _output(self, expression: Expression) -> None:
        if not isinstance(expression, FilteredExpression):
            raise _NotProvableError
        filters = list(expression.filters or [])
        left = expression.left
        if isinstance(left, Path) and _name_of(left) in BUILT_IN:
            self.uses += 1
            self.more += _CLOCK
            if filters and filters[0].name == "date":
                self._date(filters.pop(0))
        else:
            self._value(left)
            filters = filters[self._arithmetic(left, filters) :]
        for filter_ in filters:
            self._filter(filter_)

    def _arithmetic(self, left: Expression, filters: Sequence[Filter]) -> int:
        """Return how many filters at the beginning calculate with numbers."""
        count = 0
        for filter_ in filters[:_MOST_STEPS]:
            arguments = _positional(filter_)
            if len(arguments) != _ARITHMETIC.get(filter_.name):
                break
            for operand in (left, *arguments):
                if isinstance(operand, Path):
                    self.numbers.add(_name_of(operand))
                elif not isinstance(operand, _NUMBERS):
                    raise _NotProvableError
            for argument in arguments:
                self._value(argument)
                divides = filter_.name in ("divided_by", "modulo")
                if divides and not (isinstance(argument, IntegerLiteral) and argument.value):
                    raise _NotProvableError
            count += 1
            self.uses += 1
            self.more += _NUMBER
        return count

    def _date(self, filter_: Filter) -> None:
        arguments = _positional(filter_)
        if len(arguments) != 1 or not isinstance(arguments[0], StringLiteral):
            raise _NotProvableError
        form = arguments[0].value
        if not _SIMPLE_DATE.fullmatch(form):
            raise _NotProvableError
        self.more += len(form) + _CLOCK * len(_DIRECTIVE.findall(form))

    def _filter(self, filter_: Filter) -> None:
        arguments = _positional(filter_)
        if filter_.name == "truncate":
            if not (len(arguments) == 1 and isinstance(arguments[0], IntegerLiteral)):
                raise _NotProvableError
            self.more += 3
            self.uses += 1
            return
        if len(arguments) not in _PLAIN_FILTERS.get(filter_.name, ()):
            raise _NotProvableError
        self.uses += 1
        for argument in arguments:
            self._value(argument)

    def _value(self, expression: Expression) -> None:
        """Count the use of a column or a literal. The source's length covers literals."""
        if isinstance(expression, Path):
            if _name_of(expression) in BUILT_IN:
                raise _NotProvableError
            self.uses += 1
        elif not isinstance(expression, _LITERALS):
            raise _NotProvableError

    def _condition(self, expression: Expression) -> None:
        if isinstance(expression, BooleanExpression):
            self._condition(expression.expression)
        elif isinstance(expression, LogicalAndExpression | LogicalOrExpression):
            self._condition(expression.left)
            self._condition(expression.right)
        elif isinstance(expression, _ORDERED):
            self._ordered(expression.left, expression.right)
        elif isinstance(expression, EqExpression | NeExpression):
            self._value(expression.left)
            self._value(expression.right)
        elif isinstance(expression, ContainsExpression):
            if not isinstance(expression.left, Path | StringLiteral):
                raise _NotProvableError
            self._value(expression.left)
            self._value(expression.right)
        else:
            self._value(expression)

    def _ordered(self, left: Expression, right: Expression) -> None:
        """Two texts can always be compared, and a text that is a number with a number."""
        for one, other in ((left, right), (right, left)):
            self._value(one)
            if not isinstance(one, (Path, StringLiteral, *_NUMBERS)):
                raise _NotProvableError
            if isinstance(one, Path) and isinstance(other, _NUMBERS):
                self.numbers.add(_name_of(one))
        if isinstance(left, StringLiteral) and isinstance(right, _NUMBERS):
            raise _NotProvableError
        if isinstance(right, StringLiteral) and isinstance(left, _NUMBERS):
            raise _NotProvableError


def _positional(filter_: Filter) -> list[Expression]:
    arguments = filter_.args
    if not all(isinstance(each, PositionalArgument) for each in arguments):
        raise _NotProvableError
    return [each.value for each in arguments]


def _name_of(path: Path) -> str:
    """Return the name of a column, which is the whole path."""
    if len(path.path) != 1 or not isinstance(path.path[0], str):
        raise _NotProvableError
    return path.path[0]
