"""The templates of one batch: Liquid, parsed once, rendered for each mail.

Templates use lower-case names of columns (`First Name` is `{{ first_name }}`, see `variable_name`).
If a required column is missing, the row is rejected. An empty cell is an empty text, which
`default` also replaces. `shared.templates.variables` decides what is required.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from json.encoder import encode_basestring
from typing import Final, NamedTuple

from outbox_server.shared.bounds import MAX_SUBJECT_BYTES
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.message_size import TextSize, utf8_size
from outbox_server.shared.templates.guard import RENDER_BUDGET
from outbox_server.shared.templates.head import (
    NO_HEAD,
    HeadTemplates,
    HeadTexts,
    RenderedHead,
)
from outbox_server.shared.templates.parsing import parse_source
from outbox_server.shared.templates.plain import plain_source
from outbox_server.shared.templates.source import (
    MAX_SOURCE_BYTES,
    RenderError,
    RenderingProof,
    Room,
    TemplateSource,
    check_source_size,
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

SUBJECT_TOO_LONG: Final = (
    f"a subject can have at most {MAX_SUBJECT_BYTES} bytes once it is encoded for the mail; "
    "characters that are not ASCII take several"
)
# A line break ends a header, so neither a subject nor an address may contain one.
LINE_BREAK = re.compile(r"[\r\n]")
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_NOT_ALPHANUMERIC = re.compile(r"[\W_]+")
# The longest mail, in characters, that is built in an event loop, in about 2 ms.
_MOST_QUICK_CHARACTERS = 64 * 1024
_EMPTY_HEAD: Final = RenderedHead()


class Rendered(NamedTuple):
    """The texts of one mail. At least one of `body` and `html` is not None."""

    subject: str
    body: str | None
    html: str | None
    head: RenderedHead = _EMPTY_HEAD


def variable_name(column: str) -> str:
    """Return the name of a column in templates: `First Name` is `first_name`.

    The name is in lower case. Each series of other characters than letters and digits becomes one
    underscore, except at the ends. A leading digit gets an underscore in front. A name that is an
    identifier already keeps its underscores. Letters of all alphabets stay, because Liquid accepts
    them. The result is empty if nothing is left.
    """
    # Compose accented letters: an accent that is a character of its own would not be a letter.
    text = unicodedata.normalize("NFC", column.strip()).lower()
    if _IDENTIFIER.fullmatch(text):
        return text
    name = _NOT_ALPHANUMERIC.sub("_", text).strip("_")
    return f"_{name}" if name[:1].isdigit() else name


def encode_variables(values: Sequence[str | None]) -> str | None:
    """Return a row's values as stored: a compact JSON array, or None without values."""
    if not values:
        return None
    return "[" + ",".join(["null" if v is None else encode_basestring(v) for v in values]) + "]"


def decode_variables(names: Sequence[str], variables: str | None) -> dict[str, str]:
    """Return the values by name. `encode_variables` stored them in the order of `names`."""
    if variables is None:
        return {}
    return {
        name: value
        for name, value in zip(names, json.loads(variables), strict=True)
        if value is not None
    }


class BatchTemplate:
    """Subject, text, HTML and head of one batch. Two threads must not use it at once.

    `variable_names` are all columns that `render` uses, sorted. `required` are those that every row
    must have. `subject_names` are those that the subject uses.
    """

    def __init__(
        self,
        subject: TemplateSource | None,
        body: TemplateSource | None,
        html: TemplateSource | None,
        head: HeadTemplates | None = None,
    ) -> None:
        """Use these templates. None means the row's own text, and no further head.

        Raises:
            InvalidInput: SUBJECT_TOO_LONG, SUBJECT_LINE_BREAK, for a subject without columns.
        """
        self._subject, self._body, self._html, self._head = subject, body, html, head
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
                names |= source.summary.names
                required |= source.summary.required
        if subject is None:
            required.add("subject")
        head_sources = [] if head is None else head.sources
        if head is not None:
            names |= head.names
            required |= head.required
            uses += head.uses
        self.variable_names: tuple[str, ...] = tuple(sorted(names))
        self.required: frozenset[str] = frozenset(required)
        self.subject_names: frozenset[str] = frozenset(
            ("subject",) if subject is None else subject.summary.names
        )
        # How often the mail uses its most used column, as far as `least_size` counts.
        self.most_uses: int = max(uses.values(), default=1)
        # Whether the subject's template has a line break itself; otherwise only a value with a line
        # break can put one into the subject.
        self.subject_breaks: bool = (
            subject is not None and not subject.is_liquid and subject.summary.may_break
        )
        self.subject_is_liquid: bool = subject is not None and subject.is_liquid
        # Whether a row can have no content: neither text nor HTML has a template.
        self.content_from_row: bool = body is None and html is None
        self.subject_from_row: bool = subject is None
        # Whether a row may be impossible to render, so that rows are rendered at intake.
        liquid = [source for _, source in self._sources if source and source.is_liquid]
        renders_head = head is not None and head.is_liquid
        self.may_fail: bool = bool(liquid) or renders_head
        # Whether the head must be checked for each row, without rendering the rest of the mail.
        self.checks_head: bool = head is not None and bool(head.names) and not renders_head
        # What proves that a row can be rendered. Empty if nothing does.
        proofs = [source.summary.proof for source in liquid if source.summary.proof is not None]
        is_proof = len(proofs) == len(liquid) and not renders_head
        self.proofs: list[RenderingProof] = proofs if is_proof else []
        self.plain_sources: list[TemplateSource] = [
            source for _, source in self._sources if source and not source.is_liquid
        ] + head_sources
        self.subject_proof: RenderingProof | None = (
            None if subject is None or subject.summary.may_break else subject.summary.proof
        )

        # A subject with columns is checked for each row, and so is one whose text changes.
        if subject is not None and not subject.is_liquid and not self.subject_names:
            try:
                self.render_subject({})
            except RenderError as error:
                raise InvalidInput.field("subject", error.message, reason=error.reason) from None

    @classmethod
    def compile(
        cls, subject: str | None, body: str | None, html: str | None, head: HeadTexts = NO_HEAD
    ) -> BatchTemplate:
        """Parse the sources in this process, which may take long (see `shared.templates.parsing`).

        None means the row's own column of that name, without a template.

        Raises:
            InvalidInput: TEMPLATE_INVALID, for the field `subject`, `body` or `html`, with line and
                column; TEMPLATE_TOO_LARGE; SUBJECT_LINE_BREAK; those of `HeadTemplates`.
        """
        longest = longest_of(subject, body, html, head)
        return cls(
            **{
                field: None if text is None else parse_source(field, text, longest)
                for field, text in check_sizes(subject, body, html).items()
            },
            head=head.compiled(lambda field, text: parse_source(field, text, longest)),
        )

    @classmethod
    def plain(
        cls, subject: str | None, body: str | None, html: str | None, head: HeadTexts = NO_HEAD
    ) -> BatchTemplate | None:
        """Return the template if it is short and only inserts columns, or None.

        This takes microseconds. With a longer template, no mail is quick to build.

        Raises:
            InvalidInput: TEMPLATE_TOO_LARGE, SUBJECT_LINE_BREAK, those of `HeadTemplates`.
        """
        texts = check_sizes(subject, body, html)
        if sum(len(text or "") for text in texts.values()) > _MOST_QUICK_CHARACTERS:
            return None
        found: dict[str, TemplateSource] = {}
        for field, text in (texts | head.sources()).items():
            if text is None:
                continue
            summary = plain_source(field, text)
            if summary is None:
                return None
            found[field] = TemplateSource(summary)
        return cls(
            **{field: found.get(field) for field in texts},
            head=head.compiled(lambda field, _: found[field]),
        )

    def is_quick(self, characters: int) -> bool:
        """Return whether a mail may be built in an event loop: its text is short and plain.

        `characters` is the length of the row's values together.
        """
        most = characters * self.most_uses
        in_head = () if self._head is None else self._head.sources
        for source in (self._subject, self._body, self._html, *in_head):
            if source is not None:
                if not source.is_quick:
                    return False
                most += source.own_bytes
        return most <= _MOST_QUICK_CHARACTERS

    def render_subject(self, values: Mapping[str, str], room: Room | None = None) -> str:
        """Return the subject for one row, without white space around it.

        Raises:
            RenderError: see `render`.
        """
        room = Room(RENDER_BUDGET) if room is None else room
        text = (self._text("subject", self._subject, values, room) or "").strip()
        if LINE_BREAK.search(text):
            raise RenderError("SUBJECT_LINE_BREAK", "a subject cannot contain a line break")
        # Encoded it is at least as long. The mail's builder checks the encoded one.
        if len(text.encode("utf-8", "replace")) > MAX_SUBJECT_BYTES:
            raise RenderError("SUBJECT_TOO_LONG", SUBJECT_TOO_LONG)
        return text

    def render_head(self, values: Mapping[str, str], room: Room | None = None) -> RenderedHead:
        """Return the head for one row.

        Raises:
            RenderError: see `HeadTemplates.render`.
        """
        if self._head is None:
            return _EMPTY_HEAD
        return self._head.render(values, Room(RENDER_BUDGET) if room is None else room)

    def render(self, values: Mapping[str, str], max_bytes: int = RENDER_BUDGET) -> Rendered:
        """Return the texts for one row. `values` are by variable name, without missing columns.

        Rendering stops as soon as the texts have more than `max_bytes` in UTF-8.

        Raises:
            RenderError: a subject of two lines, a wrong header, neither text nor HTML, too much
                text or work, or a filter that fails on these values.
        """
        room = Room(max_bytes)
        subject = self.render_subject(values, room)
        head = self.render_head(values, room)
        body = self._text("body", self._body, values, room)
        html = self._text("html", self._html, values, room)
        if body is None and html is None:
            raise RenderError("NO_CONTENT", "the mail has neither text nor HTML")
        return Rendered(subject, body, html, head)

    @staticmethod
    def _text(
        field: str, source: TemplateSource | None, values: Mapping[str, str], room: Room
    ) -> str | None:
        if source is not None:
            return source.render(values, room)
        # If the row's own text or HTML is an empty cell, the mail lacks that part.
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


def check_sizes(subject: str | None, body: str | None, html: str | None) -> dict[str, str | None]:
    """Return the sources by field.

    Raises:
        InvalidInput: TEMPLATE_TOO_LARGE.
    """
    sources = {"subject": subject, "body": body, "html": html}
    for field, text in sources.items():
        if text is not None:
            check_source_size(field, text)
    return sources


def longest_of(
    subject: str | None, body: str | None, html: str | None, head: HeadTexts = NO_HEAD
) -> int:
    """Return the length of the longest source."""
    return max(head.longest, *(len(source or "") for source in (subject, body, html)))


def missing_column(name: str, columns: Iterable[str]) -> str:
    """Return the error for a template that requires `name`, which is not among `columns`."""
    known = set(columns)
    proper = variable_name(name)
    if proper != name and proper in known:
        return f"there is no column {name!r}; variables are in lower case: write {{{{ {proper} }}}}"
    return (
        f"the template needs {{{{ {name} }}}}, but there is no such column; "
        f'add it, or set a default: {{{{ {name} | default: "..." }}}}'
    )
