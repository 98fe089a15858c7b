"""Makes python-liquid safe for untrusted templates: a sandbox with limits on time and memory.

A template can read only the row. The library's own limits do not cover ranges outside `for`, the
results of filters, or how often a `case` renders a block: without this guard, one line of template
can use minutes and gigabytes. With it, rendering ends with a `ResourceLimitError` in well under a
second.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from io import StringIO
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import liquid
from cachetools import LRUCache
from liquid.builtin.expressions.primitive import RangeLiteral
from liquid.builtin.output import Output, OutputNode
from liquid.builtin.tags.case_tag import CaseTag, MultiExpressionBlockNode
from liquid.builtin.tags.echo_tag import EchoNode, EchoTag
from liquid.context import RenderContext
from liquid.exceptions import ResourceLimitError
from liquid.expression import Expression
from liquid.filter import with_environment
from liquid.stringify import to_liquid_string
from liquid.template import BoundTemplate
from markupsafe import Markup

from outbox_server.shared.message_size import escape_growth, fits_escaped, utf8_size
from outbox_server.shared.templates.comparing import compare_as_numbers, equal
from outbox_server.shared.templates.wording import TemplateFault, TemplateLimitError

if TYPE_CHECKING:
    from liquid.ast import Node
    from liquid.stream import TokenStream

# The work of one rendering, in characters that are written or that filters read: several times the
# largest mail. Output and captures count.
RENDER_BUDGET = 32 * 1024 * 1024
# The longest text and the longest list that a filter accepts or returns.
MAX_CHARACTERS = 1024 * 1024
MAX_ITEMS = 1_000
MAX_NUMBER_BITS = 4_096
# The cost of a filter call in addition to its characters.
_CALL_COST = 64
# Parsers that are slow (html.parser, dateutil) get short texts only.
_SLOW_FILTERS = {"strip_html": 16 * 1024, "date": 256}
# strftime pads to any width that the format names: `%999999999d` would be a gigabyte.
_PADDED_DIRECTIVE = re.compile(r"%[^a-zA-Z%]*\d")
_KEPT_ENVIRONMENTS = 16
# Iterations x source characters, which bounds the nodes that nested loops visit (about a second).
_LOOP_WORK = 5_000_000


class OutputTooLargeError(TemplateLimitError):
    """The output would exceed its limit by at least `over` bytes."""

    def __init__(self, over: int) -> None:
        super().__init__("the output is too large")
        self.over = over


class Budget:
    """The work that a rendering may still do, and the most bytes that its output may have."""

    __slots__ = ("left", "output")

    def __init__(self) -> None:
        self.left = RENDER_BUDGET
        self.output = RENDER_BUDGET

    def reset(self, output: int) -> None:
        """Start a rendering with an output of at most `output` bytes."""
        self.left = RENDER_BUDGET
        self.output = output

    def spend(self, amount: int) -> None:
        """Use up `amount` characters of work.

        Raises:
            ResourceLimitError: nothing is left.
        """
        self.left -= amount
        if self.left < 0:
            raise TemplateLimitError("the template does too much work")


_write = StringIO.write


class _Buffer(StringIO):
    """A text of at most `room` bytes in UTF-8. Writing to it uses up the rendering's budget."""

    def __init__(self, budget: Budget, room: int) -> None:
        super().__init__(newline="")
        self._budget = budget
        self.room = room

    def write(self, text: str) -> int:
        # Optimized for speed, because a mail has many short texts.
        length = len(text)
        budget = self._budget
        budget.left -= length
        if budget.left < 0:
            budget.spend(0)
        self.room -= length if text.isascii() else utf8_size(text)
        if self.room < 0:
            self.refuse(-self.room)
        return _write(self, text)

    def refuse(self, over: int) -> NoReturn:
        del over
        raise TemplateLimitError("a captured text is too long")


class _Output(_Buffer):
    """The buffer of a rendering's output."""

    def refuse(self, over: int) -> NoReturn:
        raise OutputTooLargeError(over)


class _Context(RenderContext):
    __slots__ = ()
    env: GuardedEnvironment

    def get_buffer(self, buf: TextIO | None = None) -> StringIO:
        del buf
        # A captured text may be longer than the mail, because a filter may shorten it.
        budget = self.env.budget
        return _Buffer(budget, max(budget.output, self.env.local_namespace_limit))


class _Template(BoundTemplate):
    context_class = _Context
    env: GuardedEnvironment

    def _get_buffer(self) -> StringIO:
        return _Output(self.env.budget, self.env.budget.output)


def _check_escaped(value: object, context: RenderContext, buffer: TextIO) -> None:
    """Refuse a text that does not fit once it is escaped, before it is escaped."""
    if (
        context.autoescape
        and isinstance(value, str)
        and not isinstance(value, Markup)
        and isinstance(buffer, _Buffer)
        and not fits_escaped(value, buffer.room)
    ):
        buffer.refuse(len(value) + escape_growth(value) - buffer.room)


class _OutputNode(OutputNode):
    def render_to_output(self, context: RenderContext, buffer: TextIO) -> int:
        value = self.expression.evaluate(context)
        _check_escaped(value, context, buffer)
        return buffer.write(to_liquid_string(value, context.autoescape))


class _OutputTag(Output):
    node_class = _OutputNode


class _EchoNode(_OutputNode, EchoNode):
    pass


class _EchoTag(EchoTag):
    node_class = _EchoNode


class _AnyOf(Expression):
    """The values of one `when`, combined so that they are true at most once.

    The library renders the block once for each value that matches, so nested cases with repeated
    values grow exponentially, which no limit of the library covers.
    """

    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        super().__init__(inner.token)
        self.inner = inner

    def __str__(self) -> str:
        return str(self.inner)

    def evaluate(self, context: RenderContext) -> list[bool]:
        left = self.inner.left.evaluate(context)
        return [any(equal(left, one.evaluate(context)) for one in self.inner.expressions)]

    def children(self) -> list[Expression]:
        return list(self.inner.children())


class _CaseTag(CaseTag):
    def parse(self, stream: TokenStream) -> Node:
        node = super().parse(stream)
        for block in node.blocks:  # type: ignore[attr-defined]
            if isinstance(block, MultiExpressionBlockNode):
                block.expression = _AnyOf(block.expression)  # type: ignore[assignment]
        return node


class BoundedRange(RangeLiteral):
    """A range that is never longer than a loop may be.

    It replaces each range of a parsed template (`guard_expression`).
    """

    __slots__ = ()

    def evaluate(self, context: RenderContext) -> range:
        """Return the range; raise ResourceLimitError if it is too long."""
        result = super().evaluate(context)
        # len() cannot be used, because it overflows from 2**63 on.
        if result.stop - result.start > MAX_ITEMS:
            raise TemplateLimitError("a range is too long", token=self.token)
        return result


def guard_expression(expression: Expression) -> None:
    """Make every range below `expression` a `BoundedRange`, and every comparison one of numbers."""
    if type(expression) is RangeLiteral:
        expression.__class__ = BoundedRange
    compare_as_numbers(expression)
    for child in expression.children():
        guard_expression(child)


def _size(value: object) -> int:
    """Return the size of `value` in characters, approximately.

    Raises:
        ResourceLimitError: it is too large for a filter.
    """
    if isinstance(value, str):
        size = len(value)
    elif isinstance(value, (list, tuple)):
        if len(value) > MAX_ITEMS:
            raise TemplateLimitError("a list is too long")
        size = sum(_size(item) + 1 for item in value)
    elif isinstance(value, bool):
        return 0
    elif isinstance(value, int):
        if value.bit_length() > MAX_NUMBER_BITS:
            raise TemplateLimitError("a number is too large")
        return 0
    elif isinstance(value, Decimal):
        exponent = value.as_tuple().exponent
        if isinstance(exponent, int) and abs(exponent) > MAX_NUMBER_BITS:
            raise TemplateLimitError("a number is too large")
        return 0
    else:
        return 0
    if size > MAX_CHARACTERS:
        raise TemplateLimitError("a text is too long for a filter")
    return size


def _total_size(left: object, arguments: tuple[object, ...]) -> int:
    """Return the size of the values of a filter. Optimized for short texts, which most are.

    Raises:
        ResourceLimitError: one of them is too large for a filter.
    """
    size = len(left) if type(left) is str else _size(left)
    for argument in arguments:
        size += len(argument) if type(argument) is str else _size(argument)
    if size > MAX_CHARACTERS:
        for value in (left, *arguments):
            _size(value)
    return size


def _result_size(name: str, left: object, arguments: tuple[object, ...]) -> int:
    """Return the size of the result of `replace` or `join`, without computing the result."""
    if name == "join" and isinstance(left, (list, tuple)):
        return len(left) * len(str(arguments[0])) if arguments else 0
    if name == "replace" and len(arguments) > 1:
        # Escaping turns a character into at most six (`&quot;`).
        return str(left).count(str(arguments[0])) * len(str(arguments[1])) * 6
    return 0


def _filter_fault(name: str) -> TemplateFault:
    """Return the error of a filter that fails. It does not repeat the cells."""
    if name in ("divided_by", "modulo"):
        return TemplateFault(
            f"the filter `{name}` cannot be used on the values of this row: it divides by zero, "
            "and an empty cell counts as zero"
        )
    return TemplateFault(f"the filter `{name}` cannot be used on the values of this row")


# Cached, because each batch has environments of its own and all of them use the same filters.
@functools.cache
def _guard(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    slow = _SLOW_FILTERS.get(name)
    wants_environment = getattr(filter_, "with_environment", False)
    is_date, multiplies = name == "date", name in ("join", "replace")

    @with_environment
    @functools.wraps(filter_)  # keeps attributes such as `with_context`
    def guarded(
        left: object, *arguments: object, environment: GuardedEnvironment, **named: object
    ) -> Any:
        size = _total_size(left, arguments)
        if named:
            size += _total_size("", tuple(named.values()))
        if slow is not None and size > slow:
            raise TemplateLimitError(f"a text is too long for `{name}`")
        if is_date and arguments and _PADDED_DIRECTIVE.search(str(arguments[0])):
            raise TemplateLimitError("the format of `date` must not have a width")
        if multiplies and _result_size(name, left, arguments) > MAX_CHARACTERS:
            raise TemplateLimitError(f"the result of `{name}` is too long")
        environment.budget.spend(_CALL_COST + size)
        if wants_environment:
            named["environment"] = environment
        try:
            result = filter_(left, *arguments, **named)
        except (ResourceLimitError, MemoryError):
            raise
        # Filters pass on errors of all kinds: base64 that is not text, a date out of range.
        except Exception:  # noqa: BLE001
            raise _filter_fault(name) from None
        if type(result) is not str or len(result) > MAX_CHARACTERS:
            _size(result)
        return result

    return guarded


def _most_iterations(longest: int) -> int:
    return min(MAX_ITEMS, max(20, _LOOP_WORK // max(1, longest)))


class GuardedEnvironment(liquid.Environment):
    """Parses and renders one batch's templates; `longest` is the length of the longest source."""

    block_nesting_limit = 20
    context_depth_limit = 20
    local_namespace_limit = 4 * MAX_CHARACTERS
    template_class = _Template

    def __init__(self, *, autoescape: bool, longest: int) -> None:
        self.budget = Budget()
        super().__init__(autoescape=autoescape)
        # Set per instance: a longer source may have fewer iterations.
        self.loop_iteration_limit = _most_iterations(longest)  # type: ignore[misc]

    def setup_tags_and_filters(self, *, extra: bool = False) -> None:
        """Register Liquid's tags and filters: no partials, no `safe`, every filter guarded."""
        super().setup_tags_and_filters(extra=extra)
        for name in ("include", "render"):
            del self.tags[name]
        for tag in (_CaseTag, _OutputTag, _EchoTag):
            self.add_tag(tag)
        del self.filters["safe"]
        for name, filter_ in _sorted_items(self.filters):
            self.filters[name] = _guard(name, filter_)


class Environments:
    """Environments that the templates of one thread share.

    It takes longer to make one than to parse a usual template. All templates of at most 5,000
    characters with the same escaping have the same environment.
    """

    def __init__(self) -> None:
        self._made: LRUCache[tuple[bool, int], GuardedEnvironment] = LRUCache(_KEPT_ENVIRONMENTS)

    def get(self, *, autoescape: bool, longest: int) -> GuardedEnvironment:
        """Return the environment of a template, as `GuardedEnvironment` makes it."""
        key = autoescape, _most_iterations(longest)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = GuardedEnvironment(autoescape=autoescape, longest=longest)
        return made


def _sorted_items(
    filters: dict[str, Callable[..., Any]],
) -> Iterable[tuple[str, Callable[..., Any]]]:
    return sorted(filters.items())
