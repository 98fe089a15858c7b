"""The templates of one batch: Liquid, parsed once, rendered for each mail.

Columns are named in lower case (`First Name` is `{{ first_name }}`): `variable_name` says how.
An absent column that a template requires is an error of the row; an empty cell is an empty text,
for which `default` stands in as well. What is required: `shared.templates.variables`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from json.encoder import encode_basestring
from typing import NamedTuple

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.message_size import TextSize, utf8_size
from outbox_server.shared.templates.guard import RENDER_BUDGET, GuardedEnvironment
from outbox_server.shared.templates.source import (
    MAX_SOURCE_BYTES,
    RenderError,
    Room,
    TemplateSource,
)

__all__ = [
    "LINE_BREAK",
    "MAX_SOURCE_BYTES",
    "BatchTemplate",
    "RenderError",
    "Rendered",
    "decode_variables",
    "encode_variables",
    "missing_column",
    "variable_name",
]

# A line break ends a header: neither a subject nor an address may hold one.
LINE_BREAK = re.compile(r"[\r\n]")
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_NOT_ALPHANUMERIC = re.compile(r"[\W_]+")


class Rendered(NamedTuple):
    """The texts of one mail. At least one of `body` and `html` is there."""

    subject: str
    body: str | None
    html: str | None


def variable_name(column: str) -> str:
    """Return how a template names a column: `First Name` is `first_name`.

    Lower case; anything that is neither letter nor digit becomes one underscore, none at the ends;
    a leading digit gets one in front. A name that is an identifier already keeps its underscores.
    Letters of all alphabets stay: Liquid takes them. Empty if nothing is left to name.
    """
    # One spelling of an accented letter, and none as letter plus accent: an accent is no letter.
    text = unicodedata.normalize("NFC", column.strip()).lower()
    if _IDENTIFIER.fullmatch(text):
        return text
    name = _NOT_ALPHANUMERIC.sub("_", text).strip("_")
    return f"_{name}" if name[:1].isdigit() else name


def encode_variables(values: Sequence[str | None]) -> str | None:
    """Return the stored form of a row's values: a compact JSON array, None if there are none."""
    if not values:
        return None
    return "[" + ",".join(["null" if v is None else encode_basestring(v) for v in values]) + "]"


def decode_variables(names: Sequence[str], variables: str | None) -> dict[str, str]:
    """Return the values by name that `encode_variables` stored in the order of `names`."""
    if variables is None:
        return {}
    return {
        name: value
        for name, value in zip(names, json.loads(variables), strict=True)
        if value is not None
    }


class BatchTemplate:
    """Subject, text and HTML of one batch. Not for use by two threads at once.

    `variable_names`: the columns that are needed at all, sorted; what `render` looks at.
    `required`: those that every row must have. `subject_names`: those that the subject uses.
    """

    def __init__(
        self,
        subject: TemplateSource | None,
        body: TemplateSource | None,
        html: TemplateSource | None,
    ) -> None:
        self._subject, self._body, self._html = subject, body, html
        self._sources = (("subject", subject), ("body", body), ("html", html))
        names: set[str] = set()
        required: set[str] = set()
        uses: Counter[str] = Counter()
        for field, source in self._sources:
            if source is None:
                names.add(field)
                uses[field] += 1
            else:
                for name, times in source.uses:
                    uses[name] += times
                names |= source.needs.names
                required |= source.needs.required
        if subject is None:
            required.add("subject")
        self.variable_names: tuple[str, ...] = tuple(sorted(names))
        self.required: frozenset[str] = frozenset(required)
        self.subject_names: frozenset[str] = frozenset(
            ("subject",) if subject is None else subject.needs.names
        )
        # How often the mail uses its most used column, as far as `least_size` counts.
        self.most_uses: int = max(uses.values(), default=1)
        # Whether the subject's template can break the line by itself, so that each row has to be
        # tried; otherwise only a value with a line break can.
        self.subject_may_break: bool = subject is not None and subject.may_break
        # Whether a row can be without content: both its texts are its own.
        self.content_from_row: bool = body is None and html is None
        self.subject_from_row: bool = subject is None

    @classmethod
    def compile(cls, subject: str | None, body: str | None, html: str | None) -> BatchTemplate:
        """Parse the sources. None: the row's own column of that name, as it is, no template.

        Raises:
            InvalidInput: TEMPLATE_INVALID, a violation of `subject`, `body` or `html`, with line
                and column; TEMPLATE_TOO_LARGE; SUBJECT_LINE_BREAK.
        """
        longest = max(len(source or "") for source in (subject, body, html))
        plain = GuardedEnvironment(autoescape=False, longest=longest)
        sources: dict[str, TemplateSource | None] = {}
        for field, text in (("subject", subject), ("body", body), ("html", html)):
            if text is None:
                sources[field] = None
                continue
            if len(text.encode("utf-8", "replace")) > MAX_SOURCE_BYTES:
                raise InvalidInput.field(
                    field,
                    f"a template takes at most {MAX_SOURCE_BYTES // 1024} KiB",
                    reason="TEMPLATE_TOO_LARGE",
                )
            env = GuardedEnvironment(autoescape=True, longest=longest) if field == "html" else plain
            sources[field] = TemplateSource(field, text, env)
        template = cls(**sources)
        if not template.subject_names:
            try:
                template.render_subject({})
            except RenderError as error:
                raise InvalidInput.field("subject", error.message, reason=error.reason) from None
        return template

    def render_subject(self, values: Mapping[str, str], room: Room | None = None) -> str:
        """Return the subject for one row, without white space around it.

        Raises:
            RenderError: as `render`.
        """
        room = Room(RENDER_BUDGET) if room is None else room
        text = (self._text("subject", self._subject, values, room) or "").strip()
        if LINE_BREAK.search(text):
            raise RenderError("SUBJECT_LINE_BREAK", "a subject cannot contain a line break")
        return text

    def render(self, values: Mapping[str, str], max_bytes: int = RENDER_BUDGET) -> Rendered:
        """Return the texts for one row; `values` by variable name, absent columns left out.

        Rendering stops as soon as the texts have more than `max_bytes` in UTF-8.

        Raises:
            RenderError: a subject of two lines, neither text nor HTML, too much text or work, or a
                filter that fails on these values.
        """
        room = Room(max_bytes)
        subject = self.render_subject(values, room)
        body = self._text("body", self._body, values, room)
        html = self._text("html", self._html, values, room)
        if body is None and html is None:
            raise RenderError("NO_CONTENT", "the mail has neither text nor HTML")
        return Rendered(subject, body, html)

    @staticmethod
    def _text(
        field: str, source: TemplateSource | None, values: Mapping[str, str], room: Room
    ) -> str | None:
        if source is not None:
            return source.render(values, room)
        # If the row's own text or HTML is an empty cell, the mail does not have that part.
        text = values.get(field) or None
        room.take(utf8_size(text or ""))
        return text

    def least_size(self, values: Mapping[str, str]) -> int:
        """Return a lower bound of the size of a row's encoded mail, without rendering it."""
        least = 0
        for field, source in self._sources:
            size = (
                TextSize.of(values.get(field, "")) if source is None else source.least_size(values)
            )
            least += size.least_encoded
        return least


def missing_column(name: str, columns: Iterable[str]) -> str:
    """Return what to tell a user whose template requires `name`, which is none of `columns`."""
    known = set(columns)
    proper = variable_name(name)
    if proper != name and proper in known:
        return f"there is no column {name!r}; variables are in lower case: write {{{{ {proper} }}}}"
    return (
        f"the template needs {{{{ {name} }}}}, and there is no such column; "
        f'add it, or give a default: {{{{ {name} | default: "..." }}}}'
    )
