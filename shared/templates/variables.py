"""Finds the variables that a parsed Liquid template needs from a row.

A variable is *required* unless each of its uses works without it: it has the `default` filter
(`{{ name | default: "friend" }}`), or it is in the condition of an `if`, `elsif`, `unless`, `case`
or `when`, or in a block whose condition tests it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from liquid.ast import ConditionalBlockNode
from liquid.builtin.content import ContentNode
from liquid.builtin.expressions import FilteredExpression, Path, PositionalArgument, StringLiteral
from liquid.builtin.output import OutputNode
from liquid.builtin.tags.case_tag import CaseNode, MultiExpressionBlockNode
from liquid.builtin.tags.comment_tag import CommentNode
from liquid.builtin.tags.doc_tag import DocNode
from liquid.builtin.tags.if_tag import IfNode
from liquid.builtin.tags.unless_tag import UnlessNode
from liquid.context import RenderContext

from outbox_server.shared.templates.guard import guard_expression
from outbox_server.shared.templates.source import Placeholder
from outbox_server.shared.templates.wording import TemplateFault

if TYPE_CHECKING:
    from liquid.ast import Node
    from liquid.expression import Expression
    from liquid.template import BoundTemplate

_CONDITIONAL = (IfNode, UnlessNode, CaseNode, ConditionalBlockNode, MultiExpressionBlockNode)
# The library provides these two if the row does not.
BUILT_IN: Final = frozenset({"now", "today"})


@dataclass
class Needs:
    """The variables that a template uses from the row."""

    names: set[str] = field(default_factory=set)
    required: set[str] = field(default_factory=set)


def needs_of(template: BoundTemplate) -> Needs:
    """Return the variables that `template` needs, and guard its expressions.

    Raises:
        LiquidError: a filter does not exist, or the name of a variable is computed.
    """
    walk = _Walk(template)
    for node in template.nodes:
        walk.visit(node, frozenset(), frozenset())
    return walk.needs


class _Walk:
    def __init__(self, template: BoundTemplate) -> None:
        self.needs = Needs()
        self._env = template.env
        self._static = RenderContext(template)
        # The names that `assign` and `capture` have set so far, in the order of the source.
        self._assigned: set[str] = set()

    def visit(self, node: Node, guarded: frozenset[str], scope: frozenset[str]) -> None:
        """Record the variables of `node`. Those in `guarded` may be absent.

        `scope` has the variables of the loops around it.
        """
        expressions = list(node.expressions())
        for expression in expressions:
            guard_expression(expression)
        if isinstance(node, _CONDITIONAL):
            asked = {
                name
                for expression in expressions
                for name, _ in self._uses(expression, defaulted=False)
            }
            self._note(asked, scope, required=False)
            guarded |= asked
        else:
            for expression in expressions:
                for name, defaulted in self._uses(expression, defaulted=False):
                    self._note({name}, scope, required=not (defaulted or name in guarded))
        inner = scope | {str(name) for name in node.block_scope()}
        for child in node.children(self._static, include_partials=False):
            self.visit(child, guarded, inner)
        self._assigned.update(str(name) for name in node.template_scope())

    def _note(self, names: set[str], scope: frozenset[str], *, required: bool) -> None:
        names = names - scope - self._assigned
        self.needs.names |= names
        if required:
            self.needs.required |= names - BUILT_IN

    def _uses(self, expression: Expression, *, defaulted: bool) -> Iterator[tuple[str, bool]]:
        """Yield each variable of `expression`, and whether it has the `default` filter."""
        if isinstance(expression, Path):
            head = expression.head()
            if not isinstance(head, str):
                raise TemplateFault(
                    "the name of a variable cannot be computed", token=expression.token
                )
            yield head, defaulted
        if isinstance(expression, FilteredExpression):
            filters = expression.filters or []
            for filter_ in filters:
                if filter_.name not in self._env.filters:
                    raise TemplateFault(f"unknown filter '{filter_.name}'", token=filter_.token)
            has_default = any(filter_.name == "default" for filter_ in filters)
            yield from self._uses(expression.left, defaulted=has_default)
            for filter_ in filters:
                for argument in filter_.children():
                    yield from self._uses(argument, defaulted=False)
            return
        for child in expression.children():
            yield from self._uses(child, defaulted=defaulted)


def plain_parts(nodes: Sequence[Node]) -> list[str | Placeholder] | None:
    """Return the texts and placeholders of a template, so that it can be spliced.

    A splice costs a tenth of a rendering by the library. The result is None if the template has
    anything but text, comments, `{{ name }}` and `{{ name | default: "text" }}`.
    """
    parts: list[str | Placeholder] = []
    for node in nodes:
        if isinstance(node, ContentNode):
            parts.append(node.text)
        elif isinstance(node, (CommentNode, DocNode)):
            continue
        elif isinstance(node, OutputNode):
            placeholder = _placeholder(node.expression)
            if placeholder is None:
                return None
            parts.append(placeholder)
        else:
            return None
    return parts


def _placeholder(expression: Expression) -> Placeholder | None:
    if not isinstance(expression, FilteredExpression) or not isinstance(expression.left, Path):
        return None
    path = expression.left.path
    if len(path) != 1 or not isinstance(path[0], str) or path[0] in BUILT_IN:
        return None
    if not expression.filters:
        return Placeholder(path[0], None)
    if len(expression.filters) > 1 or expression.filters[0].name != "default":
        return None
    arguments = expression.filters[0].args
    if (
        len(arguments) == 1
        and isinstance(arguments[0], PositionalArgument)
        and isinstance(arguments[0].value, StringLiteral)
    ):
        return Placeholder(path[0], arguments[0].value.value)
    return None
