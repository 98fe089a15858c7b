"""Parses one template with python-liquid, which may take any time and memory.

Services do this only in worker processes (`shared.templates.worker`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from liquid.context import RenderContext
from liquid.exceptions import LiquidError, ResourceLimitError
from liquid.template import BoundTemplate

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.message_size import utf8_size
from outbox_server.shared.templates.guard import (
    RENDER_BUDGET,
    Environments,
    GuardedEnvironment,
    OutputTooLargeError,
)
from outbox_server.shared.templates.proving import prove
from outbox_server.shared.templates.source import (
    MAX_SOURCE_BYTES,
    RenderError,
    Room,
    SourceSummary,
    TemplateSource,
)
from outbox_server.shared.templates.variables import Needs, needs_of, plain_parts
from outbox_server.shared.templates.wording import TemplateFault, describe_error

# Sources that can put a line break into a text although no value has one.
_CAN_BREAK = re.compile(r"[\r\n]|_decode|newline_to_br")


def parse_source(
    field: str, source: str, longest: int, environments: Environments | None = None
) -> TemplateSource:
    """Parse one template. `longest` is the length of the batch's longest template.

    Templates that share `environments` must not be used by two threads at once.

    Raises:
        InvalidInput: TEMPLATE_INVALID, for `field`, with line and column.
    """
    escapes = field == "html"
    env = (environments or Environments()).get(autoescape=escapes, longest=longest)
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
            raise _invalid(field, error.message.removeprefix(f"{field}: ")) from None
        # Loops can make a long text from a short source. Such a text is not kept, because templates
        # of many batches are kept.
        if len(text) <= MAX_SOURCE_BYTES:
            static = text
    summary = SourceSummary(
        names=frozenset(needs.names),
        required=frozenset(needs.required),
        may_break=bool(_CAN_BREAK.search(source.strip())),
        escapes=escapes,
        static=static,
        parts=None if parts is None else tuple(parts),
        proof=None if parts is not None else prove(template.nodes, source, RenderContext(template)),
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
            raise RenderError("TEMPLATE_LIMIT", f"{self._field}: {describe_error(error)}") from None
        except LiquidError as error:
            raise RenderError(
                "TEMPLATE_RENDER_FAILED",
                f"{self._field}: {describe_error(error)}",
                column=error.column if isinstance(error, TemplateFault) else "",
            ) from None
        except MemoryError:
            raise
        # The error concerns only this row, and must not stop a dispatcher.
        except Exception:  # noqa: BLE001
            raise RenderError(
                "TEMPLATE_RENDER_FAILED", f"{self._field}: it does not fit the values of this row"
            ) from None
        room.take(utf8_size(text))
        return text


def _parse(field: str, source: str, env: GuardedEnvironment) -> tuple[BoundTemplate, Needs]:
    try:
        template = env.from_string(source)
        return template, needs_of(template)
    except LiquidError as error:
        raise _invalid(field, describe_error(error, source)) from None
    except RecursionError:
        raise _invalid(field, "an expression is nested too deeply") from None


def _invalid(field: str, description: str) -> InvalidInput:
    return InvalidInput.field(field, description, reason="TEMPLATE_INVALID")


def _uses_the_clock(source: str) -> bool:
    return "now" in source or "today" in source
