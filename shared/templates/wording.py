"""Describes in our words what is wrong with a template.

The texts of the library name its own token kinds and Python's types, which say nothing to somebody
who writes a mail. So only texts of the classes below are shown, and all others are replaced.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from liquid.exceptions import (
    BlockNestingError,
    ContextDepthError,
    FilterArgumentError,
    LiquidError,
    LiquidSyntaxError,
    LocalNamespaceLimitError,
    LoopIterationLimitError,
    ResourceLimitError,
)
from liquid.token import TOKEN_EOF, TOKEN_TAG

from outbox_server.shared.quoting import shortened

if TYPE_CHECKING:
    from liquid.token import Token

_MAX_SHOWN: Final = 40
# How the library's message names the missing end tag.
_MISSING_END: Final = re.compile(r"expected tag (\w+)")
_LIMITS: Final[tuple[tuple[type[LiquidError], str], ...]] = (
    (LoopIterationLimitError, "its loops repeat too often"),
    (LocalNamespaceLimitError, "its variables hold too much text"),
    (ContextDepthError, "it is nested too deeply"),
    (BlockNestingError, "its blocks are nested too deeply"),
    (ResourceLimitError, "the template does too much work"),
)


# A subclass, because the library adds the position to such errors of a filter.
class TemplateFault(FilterArgumentError):
    """A template is wrong, or does not fit a row. `column` is the column of the row, if known."""

    def __init__(self, text: str, *, token: Token | None = None, column: str = "") -> None:
        super().__init__(text, token=token)
        self.column = column


class TemplateLimitError(ResourceLimitError):
    """The template exceeds a limit."""

    def __init__(self, text: str, *, token: Token | None = None) -> None:
        super().__init__(text, token=token)


def describe_error(error: LiquidError, source: str | None = None) -> str:
    """Return `line 2, column 7: what is wrong`. Without a position, it is the end of the source.

    `source` is the source that does not parse. Without it, the template cannot render a row.
    """
    text = _text_of(error, renders=source is None)
    index = -1
    if error.token is not None:
        source, index = error.token.source, error.token.start_index
    if source is None:
        return text
    if not 0 <= index <= len(source):
        index = len(source)
    line = source.count("\n", 0, index) + 1
    column = index - source.rfind("\n", 0, index)
    return f"line {line}, column {column}: {text}"


def _text_of(error: LiquidError, *, renders: bool) -> str:
    if isinstance(error, TemplateFault | TemplateLimitError):
        return str(error.message)
    for kind, text in _LIMITS:
        if isinstance(error, kind):
            return text
    misplaced = isinstance(error, LiquidSyntaxError) and error.token is not None
    if renders and not misplaced:
        return "the values of this row cannot be used here"
    if error.token is None:
        return "it is not a Liquid template"
    return _text_at(error.token, str(error.message))


def _text_at(token: Token, message: str) -> str:
    """Return the text of a syntax error. Only its kind is taken from the library's message."""
    if token.kind == TOKEN_EOF:
        return _text_at_the_end(token.value, message)
    shown = shortened(token.value, _MAX_SHOWN)
    if token.kind != TOKEN_TAG:
        return f"unexpected {shown!r}"
    if message == "missing expression":
        return f"the tag `{shown}` needs an expression"
    if "never closed" in message:
        return f"`{{% {shown} %}}` is not closed"
    return f"unexpected tag {shown!r}"


def _text_at_the_end(found: str, message: str) -> str:
    if found.startswith("{{"):
        return "`{{` is not closed by `}}`"
    if found.startswith("{%"):
        return "`{%` is not closed by `%}`, or has no tag"
    missing = _MISSING_END.match(message)
    if missing:
        return f"a block is not closed: `{{% {missing[1]} %}}` is missing"
    return "an expression is incomplete"
