"""The head of a batch's mails: Reply-To, the recipient's name, further headers.

Each text is a Liquid template, as the subject is. Its result for a row is checked before the mail
is accepted, and again when it is built.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Final, NamedTuple, Self, TypeVar

from outbox_server.shared.bounds import (
    DISPLAY_NAME,
    MAX_ADDRESS,
    MAX_HEADER_TEMPLATE_BYTES,
    control_in,
)
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.mail_headers import BadHeader, check_header, check_headers
from outbox_server.shared.quoting import quoted
from outbox_server.shared.smtp.addresses import envelope_address
from outbox_server.shared.templates.source import (
    MAX_SOURCE_BYTES,
    RenderError,
    Room,
    TemplateSource,
)

T = TypeVar("T")

_REPLY_TO: Final = "reply_to"
# `Support <help@example.com>`, or the name in quotes.
_MAILBOX: Final = re.compile(r"([^<>]*)<([^<>]*)>")
_ESCAPED: Final = re.compile(r"\\(.)")
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ASCII_DOMAIN: Final = re.compile(rf"(?:{_LABEL}\.)+{_LABEL}", re.ASCII)


class Mailbox(NamedTuple):
    """An address as SMTP needs it, with the name of its owner, which may be empty."""

    name: str
    address: str


class HeadTexts(NamedTuple):
    """The texts as the caller gave them. `name_column` is a variable name; empty means none."""

    reply_to: str | None = None
    name_column: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    def sources(self) -> dict[str, str]:
        """Return the templates by field."""
        found = {} if self.reply_to is None else {_REPLY_TO: self.reply_to}
        return found | {_value_of(place): text for place, (_, text) in enumerate(self.headers)}

    @property
    def longest(self) -> int:
        """The length of the longest template."""
        return max(map(len, self.sources().values()), default=0)

    @property
    def characters(self) -> int:
        """The length of all texts together."""
        return sum(map(len, (self.name_column, *self.sources().values())))

    @classmethod
    def from_wire(cls, value: object) -> Self:
        """Return the texts from what msgpack decoded, which has lists instead of tuples."""
        match value:
            case [str() | None as reply_to, str(name_column), list(headers)]:
                return cls(reply_to, name_column, tuple((name, text) for name, text in headers))
        raise ValueError("not the texts of a head")

    def compiled(self, compile_: Callable[[str, str], TemplateSource]) -> HeadTemplates | None:
        """Return the templates that `compile_` makes of each field and text; None if all is unset.

        Raises:
            InvalidInput: TEMPLATE_TOO_LARGE; the errors of `compile_` and of `HeadTemplates`.
        """
        if self == NO_HEAD:
            return None
        for field, text in self.sources().items():
            if len(text.encode("utf-8", "replace")) > MAX_HEADER_TEMPLATE_BYTES:
                raise InvalidInput.field(
                    field,
                    f"must have at most {MAX_HEADER_TEMPLATE_BYTES // 1024} KiB",
                    reason="TEMPLATE_TOO_LARGE",
                )
        return HeadTemplates(
            self, {field: compile_(field, text) for field, text in self.sources().items()}
        )


NO_HEAD: Final = HeadTexts()


class RenderedHead(NamedTuple):
    """The head of one mail, checked. Headers are in order, and have no empty values."""

    to_name: str = ""
    reply_to: Mailbox | None = None
    headers: tuple[tuple[str, str], ...] = ()


class HeadTemplates:
    """The templates of the head. Two threads must not use them at once."""

    def __init__(self, texts: HeadTexts, sources: Mapping[str, TemplateSource]) -> None:
        """`sources` has a template for each text.

        Raises:
            InvalidInput: HEADER_INVALID, HEADER_TOO_LONG, REPLY_TO_INVALID: a part that is the same
                in all mails is wrong.
        """
        self._name_column = texts.name_column
        self._reply_to = sources.get(_REPLY_TO)
        self._headers = [
            (_value_of(place), name, sources[_value_of(place)])
            for place, (name, _) in enumerate(texts.headers)
        ]
        self.sources = list(sources.values())
        self.is_liquid = any(source.is_liquid for source in self.sources)
        named = {self._name_column} - {""}
        self.names = named.union(*(source.summary.names for source in self.sources))
        self.required = frozenset[str]().union(
            *(source.summary.required for source in self.sources)
        )
        self.uses = Counter(named)
        for source in self.sources:
            for name, times in source.uses:
                self.uses[name] += times
        self._check_unchanging()

    def render(self, values: Mapping[str, str], room: Room) -> RenderedHead:
        """Return the head for one row.

        Raises:
            RenderError: DISPLAY_NAME_INVALID, REPLY_TO_INVALID, HEADER_INVALID, HEADER_TOO_LONG,
                or those of `TemplateSource.render`.
        """
        name = self._name_of(values, room)
        reply_to = None
        if self._reply_to is not None:
            reply_to = _checked(self._reply_to, values, room, _mailbox_of)
        headers = []
        for _, header, source in self._headers:
            text = _checked(source, values, room, partial(_header, header))
            if text:
                headers.append((header, text))
        try:
            check_headers(headers)
        except BadHeader as error:
            raise RenderError(error.reason, error.message) from None
        return RenderedHead(name, reply_to, tuple(headers))

    def _name_of(self, values: Mapping[str, str], room: Room) -> str:
        column = self._name_column
        name = values.get(column, "").strip() if column else ""
        if not name:
            return ""
        problem = ""
        if control := control_in(name):
            problem = f"contains a control character ({control})"
        elif len(name) > DISPLAY_NAME.most:
            problem = f"must have at most {DISPLAY_NAME.most} characters (got {len(name):,})"
        if problem:
            raise RenderError(
                "DISPLAY_NAME_INVALID", f"the recipient's name {problem}", column=column
            )
        room.take(len(name))
        return name

    def _check_unchanging(self) -> None:
        """Check the parts that are the same for all rows.

        Raises:
            InvalidInput: HEADER_INVALID, HEADER_TOO_LONG, REPLY_TO_INVALID.
        """
        if self._reply_to is not None:
            _check_static(_REPLY_TO, self._reply_to, _mailbox_of)
        headers = []
        for field, name, source in self._headers:
            text = _check_static(field, source, partial(_header, name))
            if text:
                headers.append((name, text))
        if all(source.static is not None for _, _, source in self._headers):
            try:
                check_headers(headers)
            except BadHeader as error:
                raise InvalidInput.field("headers", error.message, reason=error.reason) from None


def _value_of(place: int) -> str:
    return f"headers[{place}].value"


def _checked(
    source: TemplateSource, values: Mapping[str, str], room: Room, check: Callable[[str], T]
) -> T:
    text = source.render(values, room).strip()
    try:
        return check(text)
    except BadHeader as error:
        # The column is known only if there is just one.
        names = source.summary.names
        column = next(iter(names)) if len(names) == 1 else ""
        raise RenderError(error.reason, error.message, column=column) from None


def _check_static(field: str, source: TemplateSource, check: Callable[[str], T]) -> T | None:
    """Return what a template gives that is the same for all rows; None for any other.

    Raises:
        InvalidInput: HEADER_INVALID, HEADER_TOO_LONG, REPLY_TO_INVALID.
    """
    if source.static is None:
        return None
    try:
        return _checked(source, {}, Room(MAX_SOURCE_BYTES), check)
    except RenderError as error:
        raise InvalidInput.field(field, error.message, reason=error.reason) from None


def _header(name: str, text: str) -> str:
    if text:
        check_header(name, text)
    return text


def _mailbox_of(text: str) -> Mailbox | None:
    """Return the mailbox; None for an empty text.

    Raises:
        BadHeader: REPLY_TO_INVALID: it is not one address, with or without a name.
    """
    if not text:
        return None
    if control := control_in(text):
        raise _bad_reply_to(f"cannot contain a control character ({control})")
    found = _MAILBOX.fullmatch(text)
    if found is None:
        return Mailbox("", _address(text))
    name = found[1].strip()
    if len(name) > 1 and name.startswith('"') and name.endswith('"'):
        name = _ESCAPED.sub(r"\1", name[1:-1])
    if len(name) > DISPLAY_NAME.most:
        raise _bad_reply_to(
            f"must have a name of at most {DISPLAY_NAME.most} characters (got {len(name):,})"
        )
    return Mailbox(name, _address(found[2].strip()))


def _address(text: str) -> str:
    if len(text) <= MAX_ADDRESS:
        with suppress(ValueError):
            address = envelope_address(text)
            domain = address.rpartition("@")[2]
            if _ASCII_DOMAIN.fullmatch(domain) or not domain.isascii():
                return address
    raise _bad_reply_to(
        f"must be one address, or a name and one address in angle brackets (got {quoted(text)})"
    )


def _bad_reply_to(problem: str) -> BadHeader:
    return BadHeader(f"Reply-To {problem}", "REPLY_TO_INVALID")
