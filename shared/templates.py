"""The templates of one batch: Liquid, parsed once, rendered for each mail.

Columns are named in lower case (`First Name` is `{{ first_name }}`): `variable_name` says how.
An absent column that a template requires is an error of the row; an empty cell is an empty text,
for which `default` stands in as well. What is required: `shared.liquid_variables`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from json.encoder import encode_basestring
from typing import NamedTuple

from liquid.exceptions import LiquidError, ResourceLimitError
from liquid.template import BoundTemplate
from markupsafe import escape

from shared.errors import InvalidInput
from shared.liquid_guard import RENDER_BUDGET, GuardedEnvironment
from shared.liquid_variables import Needs, Slot, needs_of, plain_parts

MAX_SOURCE_BYTES = 256 * 1024

# A line break ends a header: neither a subject nor an address may hold one.
LINE_BREAK = re.compile(r"[\r\n]")
# What can bring a line break into a text whose values have none.
_CAN_BREAK = re.compile(r"[\r\n]|_decode|newline_to_br")
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_NOT_ALPHANUMERIC = re.compile(r"[\W_]+")


class RenderError(Exception):
    """A mail cannot be made of this row.

    `reason` is one of SUBJECT_LINE_BREAK, NO_CONTENT, TEMPLATE_LIMIT, TEMPLATE_RENDER_FAILED.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


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


class _Source:
    """One parsed template: static text, a splice, or Liquid."""

    def __init__(self, field: str, source: str, env: GuardedEnvironment) -> None:
        self.field = field
        self._env = env
        self._template: BoundTemplate | None = None
        self._texts: list[str] = []
        self._slots: list[tuple[int, str, str | None]] = []
        self.static: str | None = None
        self.may_break = bool(_CAN_BREAK.search(source.strip()))
        template, self.needs = _parse(field, source, env)
        parts = plain_parts(template.nodes)
        if parts is None:
            self._template = template
            # A template without a variable gives the same text each time; one that fails does so
            # at once and not in the middle of a batch.
            if not self.needs.names and not _uses_the_clock(source):
                try:
                    self.static = self._render_liquid(template, {})
                except RenderError as error:
                    raise _invalid(field, error.message) from None
            return
        for part in parts:
            if isinstance(part, Slot):
                self._slots.append((len(self._texts), part.name, part.default))
                self._texts.append("")
            else:
                self._texts.append(part)
        if not self._slots:
            self.static = "".join(self._texts)

    def render(self, values: Mapping[str, str]) -> str:
        """Return the text for one row."""
        if self.static is not None:
            return self.static
        if self._template is not None:
            return self._render_liquid(self._template, values)
        texts = self._texts.copy()
        autoescape = self._env.autoescape
        for index, name, default in self._slots:
            value = values.get(name, "")
            if not value and default is not None:
                texts[index] = default
            else:
                texts[index] = escape(value) if autoescape else value
        text = "".join(texts)
        if len(text) > RENDER_BUDGET:
            raise RenderError("TEMPLATE_LIMIT", f"{self.field}: the text is too long")
        return text

    def _render_liquid(self, template: BoundTemplate, values: Mapping[str, str]) -> str:
        self._env.budget.reset()
        try:
            return template.render(values)
        except ResourceLimitError as error:
            raise RenderError("TEMPLATE_LIMIT", f"{self.field}: {_describe(error)}") from None
        except LiquidError as error:
            raise RenderError(
                "TEMPLATE_RENDER_FAILED", f"{self.field}: {_describe(error)}"
            ) from None
        # The library lets through what a filter meets in a strange value (base64 that is no text,
        # a date out of range). It is the row's own trouble and must not stop a dispatcher.
        except Exception as error:  # noqa: BLE001
            raise RenderError("TEMPLATE_RENDER_FAILED", f"{self.field}: {error}") from None


class BatchTemplate:
    """Subject, text and HTML of one batch. Not for use by two threads at once.

    `variable_names`: the columns that are needed at all, sorted; what `render` looks at.
    `required`: those that every row must have. `subject_names`: those that the subject uses.
    """

    def __init__(self, subject: _Source | None, body: _Source | None, html: _Source | None) -> None:
        self._subject, self._body, self._html = subject, body, html
        names: set[str] = set()
        required: set[str] = set()
        for field, source in (("subject", subject), ("body", body), ("html", html)):
            if source is None:
                names.add(field)
            else:
                names |= source.needs.names
                required |= source.needs.required
        if subject is None:
            required.add("subject")
        self.variable_names: tuple[str, ...] = tuple(sorted(names))
        self.required: frozenset[str] = frozenset(required)
        self.subject_names: frozenset[str] = frozenset(
            ("subject",) if subject is None else subject.needs.names
        )
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
        sources: dict[str, _Source | None] = {}
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
            sources[field] = _Source(field, text, env)
        template = cls(**sources)
        if not template.subject_names:
            try:
                template.render_subject({})
            except RenderError as error:
                raise InvalidInput.field("subject", error.message, reason=error.reason) from None
        return template

    @property
    def is_static(self) -> bool:
        """Whether every mail of the batch has the same texts."""
        return not self.variable_names and all(
            source is not None and source.static is not None
            for source in (self._subject, self._body, self._html)
        )

    def render_subject(self, values: Mapping[str, str]) -> str:
        """Return the subject for one row, without white space around it.

        Raises:
            RenderError: as `render`.
        """
        text = values.get("subject", "") if self._subject is None else self._subject.render(values)
        text = text.strip()
        if LINE_BREAK.search(text):
            raise RenderError("SUBJECT_LINE_BREAK", "a subject cannot contain a line break")
        return text

    def render(self, values: Mapping[str, str]) -> Rendered:
        """Return the texts for one row; `values` by variable name, absent columns left out.

        Raises:
            RenderError: a subject of two lines, neither text nor HTML, too much work, or a filter
                that fails on these values.
        """
        subject = self.render_subject(values)
        # An empty cell of the row's own text or HTML is no part of the mail.
        body = (values.get("body") or None) if self._body is None else self._body.render(values)
        html = (values.get("html") or None) if self._html is None else self._html.render(values)
        if body is None and html is None:
            raise RenderError("NO_CONTENT", "the mail has neither text nor HTML")
        return Rendered(subject, body, html)


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
    """Return `line 2, column 7: message`; the end of the source where the library has no place."""
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
