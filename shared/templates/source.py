"""One parsed template of a batch. It is rendered for each mail, within a limit of bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from liquid.exceptions import LiquidError, ResourceLimitError
from liquid.template import BoundTemplate
from markupsafe import escape

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.message_size import MOST_BYTES, TextSize, too_large, utf8_size
from outbox_server.shared.templates.guard import (
    RENDER_BUDGET,
    GuardedEnvironment,
    OutputTooLargeError,
)
from outbox_server.shared.templates.variables import Needs, Placeholder, needs_of, plain_parts

MAX_SOURCE_BYTES = 256 * 1024
# Sources that can put a line break into a text although no value has one.
_CAN_BREAK = re.compile(r"[\r\n]|_decode|newline_to_br")


class RenderError(Exception):
    """A mail cannot be made of this row.

    `reason` is one of SUBJECT_LINE_BREAK, NO_CONTENT, MESSAGE_TOO_LARGE, TEMPLATE_LIMIT,
    TEMPLATE_RENDER_FAILED.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class Room:
    """The bytes that the texts of one mail may still have, out of `limit`."""

    __slots__ = ("left", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.left = limit

    def check(self, size: int) -> None:
        """Check that a text of `size` bytes fits.

        Raises:
            RenderError: MESSAGE_TOO_LARGE.
        """
        if size > self.left:
            raise self.refusal(size - self.left)

    def take(self, size: int) -> None:
        """Use up `size` bytes.

        Raises:
            RenderError: MESSAGE_TOO_LARGE.
        """
        self.check(size)
        self.left -= size

    def refusal(self, over: int) -> RenderError:
        """Return the error of a mail that is at least `over` bytes above the limit."""
        return RenderError("MESSAGE_TOO_LARGE", too_large(self.limit + over, self.limit))


class TemplateSource:
    """One parsed template: static text, a splice, or Liquid."""

    def __init__(self, field: str, source: str, env: GuardedEnvironment) -> None:
        self.field = field
        self._env = env
        self._template: BoundTemplate | None = None
        self._texts: list[str] = []
        self._placeholders: list[tuple[int, str, str | None]] = []
        self.static: str | None = None
        self.may_break = bool(_CAN_BREAK.search(source.strip()))
        template, self.needs = _parse(field, source, env)
        parts = plain_parts(template.nodes)
        if parts is None:
            self._template = template
            # A template without a variable always gives the same text. Rendering it now reports an
            # error at once and not in the middle of a batch.
            if not self.needs.names and not _uses_the_clock(source):
                try:
                    text = self._render_liquid(template, {}, Room(RENDER_BUDGET))
                except RenderError as error:
                    raise _invalid(field, error.message) from None
                # Loops can make a long text of a short source. It is not kept, because templates
                # are kept for many batches.
                if len(text) <= MAX_SOURCE_BYTES:
                    self.static = text
        else:
            self._splice(parts)
        self._own_size = TextSize.of(self.static or "".join(self._texts))
        self._uses = list(
            Counter((name, default) for _, name, default in self._placeholders).items()
        )

    def _splice(self, parts: list[str | Placeholder]) -> None:
        for part in parts:
            if isinstance(part, Placeholder):
                self._placeholders.append((len(self._texts), part.name, part.default))
                self._texts.append("")
            else:
                self._texts.append(part)
        if not self._placeholders:
            self.static = "".join(self._texts)

    def render(self, values: Mapping[str, str], room: Room) -> str:
        """Return the text for one row, and subtract its size from `room`.

        Raises:
            RenderError: MESSAGE_TOO_LARGE, TEMPLATE_LIMIT, TEMPLATE_RENDER_FAILED.
        """
        if self.static is not None:
            room.take(self._own_size.size)
            return self.static
        if self._template is not None:
            return self._render_liquid(self._template, values, room)
        # A few characters of source can name a long value many times, so the size is computed
        # before the text is built.
        if self._most_bytes(values) > room.left:
            room.check(self.least_size(values).size)
        texts = self._texts.copy()
        autoescape = self._env.autoescape
        for index, name, default in self._placeholders:
            value = values.get(name, "")
            if not value and default is not None:
                texts[index] = default
            else:
                texts[index] = escape(value) if autoescape else value
        text = "".join(texts)
        room.take(utf8_size(text))
        return text

    def _most_bytes(self, values: Mapping[str, str]) -> int:
        """Return an upper bound of the size of a splice, which is cheap to compute."""
        characters = 0
        for (name, default), times in self._uses:
            characters += times * len(values.get(name) or default or "")
        return self._own_size.size + MOST_BYTES * characters

    @property
    def uses(self) -> list[tuple[str, int]]:
        """Each column that a splice uses, and how often."""
        return [(name, times) for (name, _), times in self._uses]

    def least_size(self, values: Mapping[str, str]) -> TextSize:
        """Return the size of the text for one row without rendering it; 0 for Liquid."""
        size = self._own_size
        for (name, default), times in self._uses:
            value = values.get(name, "")
            if not value and default is not None:
                value_size = TextSize.of(default)
            else:
                value_size = TextSize.of(value, escaped=self._env.autoescape)
            size = size.plus(value_size * times)
        return size

    def _render_liquid(self, template: BoundTemplate, values: Mapping[str, str], room: Room) -> str:
        self._env.budget.reset(room.left)
        try:
            text = template.render(values)
        except OutputTooLargeError as error:
            raise room.refusal(error.over) from None
        except ResourceLimitError as error:
            raise RenderError("TEMPLATE_LIMIT", f"{self.field}: {_describe(error)}") from None
        except LiquidError as error:
            raise RenderError(
                "TEMPLATE_RENDER_FAILED", f"{self.field}: {_describe(error)}"
            ) from None
        # The library passes on errors of filters (base64 that is not text, a date out of range).
        # Such an error concerns this row only, and must not stop a dispatcher.
        except Exception as error:  # noqa: BLE001
            raise RenderError("TEMPLATE_RENDER_FAILED", f"{self.field}: {error}") from None
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
