"""Parses one template with python-liquid, which may take any time and memory.

Services do this only in worker processes (`shared.templates.worker`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from liquid.exceptions import LiquidError, ResourceLimitError
from liquid.template import BoundTemplate

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.message_size import utf8_size
from outbox_server.shared.templates.guard import (
    RENDER_BUDGET,
    GuardedEnvironment,
    OutputTooLargeError,
)
from outbox_server.shared.templates.source import (
    MAX_SOURCE_BYTES,
    RenderError,
    Room,
    SourceSummary,
    TemplateSource,
)
from outbox_server.shared.templates.variables import Needs, needs_of, plain_parts

# Sources that can put a line break into a text although no value has one.
_CAN_BREAK = re.compile(r"[\r\n]|_decode|newline_to_br")


def parse_source(field: str, source: str, longest: int) -> TemplateSource:
    """Parse one template. `longest` is the length of the batch's longest template.

    Raises:
        InvalidInput: TEMPLATE_INVALID, for `field`, with line and column.
    """
    escapes = field == "html"
    env = GuardedEnvironment(autoescape=escapes, longest=longest)
    template, needs = _parse(field, source, env)
    liquid = _Liquid(field, template, env)
    parts = plain_parts(template.nodes)
    static = None
    # A template without a variable always gives the same text. Rendering it now reports an
    # error at once and not in the middle of a batch.
    if parts is None and not needs.names and not _uses_the_clock(source):
        try:
            text = liquid({}, Room(RENDER_BUDGET))
        except RenderError as error:
            raise _invalid(field, error.message) from None
        # Loops can make a long text of a short source. It is not kept, because templates are
        # kept for many batches.
        if len(text) <= MAX_SOURCE_BYTES:
            static = text
    summary = SourceSummary(
        names=frozenset(needs.names),
        required=frozenset(needs.required),
        may_break=bool(_CAN_BREAK.search(source.strip())),
        escapes=escapes,
        static=static,
        parts=None if parts is None else tuple(parts),
    )
    return TemplateSource(summary, liquid)


class _Liquid:
    """Renders a parsed template. Two threads must not use it at once."""

    def __init__(self, field: str, template: BoundTemplate, env: GuardedEnvironment) -> None:
        self._field = field
        self._template = template
        self._env = env

    def __call__(self, values: Mapping[str, str], room: Room) -> str:
        self._env.budget.reset(room.left)
        try:
            text = self._template.render(values)
        except OutputTooLargeError as error:
            raise room.refusal(error.over) from None
        except ResourceLimitError as error:
            raise RenderError("TEMPLATE_LIMIT", f"{self._field}: {_describe(error)}") from None
        except LiquidError as error:
            raise RenderError(
                "TEMPLATE_RENDER_FAILED", f"{self._field}: {_describe(error)}"
            ) from None
        except MemoryError:
            raise
        # The library passes on errors of filters (base64 that is not text, a date out of range).
        # Such an error concerns this row only, and must not stop a dispatcher.
        except Exception as error:  # noqa: BLE001
            raise RenderError("TEMPLATE_RENDER_FAILED", f"{self._field}: {error}") from None
        room.take(utf8_size(text))
        return text


def _parse(field: str, source: str, env: GuardedEnvironment) -> tuple[BoundTemplate, Needs]:
    try:
        template = env.from_string(source)
        return template, needs_of(template)
    except LiquidError as error:
        raise _invalid(field, _describe(error, source)) from None
    except RecursionError:
        raise _invalid(field, "an expression is nested too deeply") from None


def _invalid(field: str, description: str) -> InvalidInput:
    return InvalidInput.field(field, description, reason="TEMPLATE_INVALID")


def _uses_the_clock(source: str) -> bool:
    return "now" in source or "today" in source


def _describe(error: LiquidError, source: str | None = None) -> str:
    """Return `line 2, column 7: message`. Without a position, it is the end of the source."""
    index = -1
    if error.token is not None:
        source, index = error.token.source, error.token.start_index
    if source is None:
        return str(error.message)
    if not 0 <= index <= len(source):
        index = len(source)
    line = source.count("\n", 0, index) + 1
    column = index - source.rfind("\n", 0, index)
    return f"line {line}, column {column}: {error.message}"
