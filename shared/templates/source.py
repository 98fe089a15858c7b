"""One template of a batch, as every process knows it: what it needs, and how its text is made.

A template that only inserts columns is a list of parts, and any process can render it. All other
templates are Liquid. Their text comes from a function that the creator of the source passes: the
parsed template itself, or a call to a worker process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, Self, TypeAlias

from markupsafe import escape

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.message_size import MOST_BYTES, TextSize, too_large, utf8_size

MAX_SOURCE_BYTES = 256 * 1024
# A template with more insertions is not rendered in an event loop: 1,000 take half a millisecond.
_MOST_QUICK_INSERTIONS: Final = 1_000


class RenderError(Exception):
    """A mail cannot be made of this row.

    `reason` is one of SUBJECT_LINE_BREAK, NO_CONTENT, MESSAGE_TOO_LARGE, TEMPLATE_LIMIT,
    TEMPLATE_RENDER_FAILED, or one of those that `MessageError` has. `column` is the column that
    does not fit, if it is known.
    """

    def __init__(self, reason: str, message: str, *, column: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.column = column


class Room:
    """How many bytes, of `limit`, the texts of one mail may still have."""

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


class Placeholder(NamedTuple):
    """A column that a template inserts, and the text that replaces it if it is empty."""

    name: str
    default: str | None


class RenderingProof(NamedTuple):
    """What a row needs so that Liquid certainly renders it (`shared.templates.proving`)."""

    # The columns whose cells must be numbers, if the row has them.
    numbers: frozenset[str]
    # How often columns are inserted, compared or filtered, and the most bytes of other text.
    uses: int
    size: int


class SourceSummary(NamedTuple):
    """What is known of a template without its parsed form."""

    # The columns that it uses, and those that every row must have.
    names: frozenset[str]
    required: frozenset[str]
    # Whether it can put a line break into a text although no value has one.
    may_break: bool
    # Whether values are escaped for HTML.
    escapes: bool
    # Its text, if that is the same for every row.
    static: str | None = None
    # Its texts and insertions in order, if it has nothing else. None means Liquid.
    parts: tuple[str | Placeholder, ...] | None = None
    # For Liquid: None means that each row must be rendered.
    proof: RenderingProof | None = None

    def to_wire(self) -> list[object]:
        """Return the summary as msgpack can encode it."""
        parts = None if self.parts is None else [_part_to_wire(part) for part in self.parts]
        names, required = sorted(self.names), sorted(self.required)
        proof = None
        if self.proof is not None:
            proof = [sorted(self.proof.numbers), self.proof.uses, self.proof.size]
        return [names, required, self.may_break, self.escapes, self.static, parts, proof]

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Return the summary that `to_wire` encoded.

        Raises:
            ValueError: it did not encode that.
        """
        match value:
            case [list(names), list(required), bool(may_break), bool(escapes), *rest]:
                static, parts, proof = rest
            case _:
                raise ValueError("not the summary of a template")
        if not (static is None or isinstance(static, str)):
            raise ValueError("not the text of a template")
        if not all(isinstance(name, str) for name in (*names, *required)):
            raise ValueError("not the names of columns")
        if parts is not None:
            if not isinstance(parts, list):
                raise ValueError("not the parts of a template")
            parts = tuple(_part_from_wire(part) for part in parts)
        return cls(
            frozenset(names),
            frozenset(required),
            may_break,
            escapes,
            static,
            parts,
            _proof_from_wire(proof),
        )


def _proof_from_wire(value: object) -> RenderingProof | None:
    match value:
        case None:
            return None
        case [list(numbers), int(uses), int(size)]:
            return RenderingProof(frozenset(numbers), uses, size)
    raise ValueError("not a proof")


def _part_to_wire(part: str | Placeholder) -> object:
    return part if isinstance(part, str) else list(part)


def _part_from_wire(value: object) -> str | Placeholder:
    match value:
        case str():
            return value
        case [str(name), str() | None as default]:
            return Placeholder(name, default)
    raise ValueError("not a part of a template")


# Returns the text of a Liquid template for one row, and subtracts its size from the room.
LiquidText: TypeAlias = Callable[[Mapping[str, str], Room], str]


class TemplateSource:
    """One template of a batch: static text, a splice, or Liquid."""

    def __init__(self, summary: SourceSummary, liquid: LiquidText | None = None) -> None:
        """`liquid` renders the template if it is Liquid. Without it, this process cannot."""
        self.summary = summary
        self._liquid = liquid
        self._texts: list[str] = []
        self._placeholders: list[tuple[int, str, str | None]] = []
        for part in summary.parts or ():
            if isinstance(part, Placeholder):
                self._placeholders.append((len(self._texts), part.name, part.default))
                self._texts.append("")
            else:
                self._texts.append(part)
        static = summary.static
        if static is None and summary.parts is not None and not self._placeholders:
            static = "".join(self._texts)
        self.static = static
        self._own_size = TextSize.of("".join(self._texts) if static is None else static)
        self._uses = list(
            Counter((name, default) for _, name, default in self._placeholders).items()
        )

    @property
    def is_liquid(self) -> bool:
        """Whether only Liquid can render it."""
        return self.static is None and self.summary.parts is None

    @property
    def is_quick(self) -> bool:
        """Whether short values can be rendered in an event loop."""
        return not self.is_liquid and len(self._placeholders) <= _MOST_QUICK_INSERTIONS

    @property
    def own_bytes(self) -> int:
        """The size of the text around the insertions."""
        return self._own_size.size

    def render(self, values: Mapping[str, str], room: Room) -> str:
        """Return the text for one row, and subtract its size from `room`.

        Raises:
            RenderError: MESSAGE_TOO_LARGE, TEMPLATE_LIMIT, TEMPLATE_RENDER_FAILED.
        """
        if self.static is not None:
            room.take(self._own_size.size)
            return self.static
        if self.summary.parts is None:
            if self._liquid is None:
                raise RuntimeError("this process cannot render a Liquid template")
            return self._liquid(values, room)
        # A few characters of source can name a long value many times, so the size is computed
        # before the text is built.
        if self._most_bytes(values) > room.left:
            room.check(self.least_size(values).size)
        texts = self._texts.copy()
        escapes = self.summary.escapes
        for index, name, default in self._placeholders:
            value = values.get(name, "")
            if not value and default is not None:
                texts[index] = default
            else:
                texts[index] = escape(value) if escapes else value
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
                value_size = TextSize.of(value, escaped=self.summary.escapes)
            size = size.plus(value_size * times)
        return size


def check_source_size(field: str, source: str) -> None:
    """Check the length of a template.

    Raises:
        InvalidInput: TEMPLATE_TOO_LARGE.
    """
    if len(source.encode("utf-8", "replace")) > MAX_SOURCE_BYTES:
        raise InvalidInput.field(
            field,
            f"a template must have at most {MAX_SOURCE_BYTES // 1024} KiB",
            reason="TEMPLATE_TOO_LARGE",
        )
