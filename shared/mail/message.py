"""Builds mails as bytes. The parts that a batch shares are built once.

Everything that comes from a row is encoded so that it stays in its place: a header value contains
no line break, and a body cannot contain the boundary. See RFC 5322, 2045 to 2047 and 6532.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Generic, TypeVar

from outbox_server.shared.bounds import MAX_SUBJECT_BYTES
from outbox_server.shared.mail.encoders import (
    GOOD_LINE,
    NOT_PRINTABLE,
    TooLargeError,
    encode_header,
    encode_part,
    encode_subject,
    encoded_words,
)
from outbox_server.shared.message_size import too_large
from outbox_server.shared.smtp.addresses import envelope_address
from outbox_server.shared.templates.batch import (
    MAX_SOURCE_BYTES,
    SUBJECT_TOO_LONG,
    BatchTemplate,
    Rendered,
)
from outbox_server.shared.templates.head import RenderedHead

_EMPTY_HEAD = RenderedHead()
_ATOM = r"[A-Za-z0-9!#$%&'*+\-/=?^_`{|}~]+"
_PLAIN_PHRASE = re.compile(f"{_ATOM}(?: {_ATOM})*")
_SAFE_MESSAGE_ID = re.compile(r"<[!-;=?A-~]+@[!-;=?A-~]+>")
_LONGEST_QUOTED_NAME = 60
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

# Only this header distinguishes a test from other mail, so that both are treated alike.
TEST_HEADER: Final = "X-Outbox-Test: true\r\n"

T = TypeVar("T")


class MessageError(Exception):
    """The mail cannot be built, for `reason`: see `MessageBuilder`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class Message:
    """One mail, ready for SMTP (dots at line starts are not yet doubled).

    `recipient` is the address for RCPT TO. `needs_smtputf8` means that the server must offer
    SMTPUTF8 (RFC 6531).
    """

    data: bytes
    recipient: str
    needs_smtputf8: bool


def wire_address(address: str) -> str:
    """Return the form of `address` for SMTP: its domain as Punycode if its local part is ASCII.

    An address whose local part is not ASCII is returned unchanged, because it needs SMTPUTF8.

    Raises:
        MessageError: ADDRESS_INVALID.
    """
    try:
        return envelope_address(address)
    except ValueError as error:
        raise MessageError("ADDRESS_INVALID", str(error)) from None


def format_date(moment: datetime) -> str:
    """Return an aware time in the format of RFC 5322, 3.3, in UTC."""
    utc = moment.astimezone(UTC)
    return (
        f"{_DAYS[utc.weekday()]}, {utc.day} {_MONTHS[utc.month - 1]} {utc.year:04} "
        f"{utc.hour:02}:{utc.minute:02}:{utc.second:02} +0000"
    )


class MessageBuilder:
    """Builds the mails of one batch. Not thread-safe.

    `sender` is the address for MAIL FROM.
    """

    def __init__(
        self,
        sender_email: str,
        display_name: str,
        template: BatchTemplate,
        *,
        max_bytes: int,
        test: bool = False,
    ) -> None:
        """Encode what all mails share. No mail may have more than `max_bytes`.

        With `test`, each mail has a header that says that it is a test.

        Raises:
            MessageError: ADDRESS_INVALID for the sender, MESSAGE_TOO_LARGE for the display name.
        """
        self.sender = wire_address(sender_email)
        self._mark = TEST_HEADER if test else ""
        self._smtputf8 = not self.sender.isascii()
        self._template = template
        self._max_bytes = max_bytes
        try:
            self._from = f"From: {_mailbox('From', display_name, self.sender, max_bytes)}\r\n"
        except TooLargeError as error:
            raise self._too_large(max_bytes + error.over) from None
        # "=_" never occurs in quoted-printable or base64 text (RFC 2045, 6.7). The rest is random,
        # so that nobody who writes a row can guess it.
        self._boundary = f"=_{secrets.token_hex(16)}"
        # A text that is the same in all mails is encoded once.
        self._encode_subject = _CachingEncoder(encode_subject)
        self._encode_body = _CachingEncoder(self._text_part)
        self._encode_html = _CachingEncoder(self._html_part)
        self._multipart = (
            "Content-Type: multipart/alternative;\r\n"
            f' boundary="{self._boundary}"\r\n\r\n--{self._boundary}\r\n'
        ).encode()
        self._between = f"\r\n--{self._boundary}\r\n".encode()
        self._end = f"\r\n--{self._boundary}--\r\n".encode()

    def build(
        self, recipient: str, values: Mapping[str, str], message_id: str, date: datetime
    ) -> Message:
        """Return the mail for one row.

        `date` is aware. `message_id` comes from `shared.database.message_ids`.

        Raises:
            MessageError: ADDRESS_INVALID, HEADER_INVALID, SUBJECT_TOO_LONG or MESSAGE_TOO_LARGE.
            RenderError: the row does not fit the template, or the texts are too large.
        """
        address = wire_address(recipient)
        if not _SAFE_MESSAGE_ID.fullmatch(message_id):
            raise MessageError("HEADER_INVALID", f"{message_id!r} is not a Message-ID")
        rendered = self._template.render(values, self._max_bytes)
        try:
            subject = self._encode_subject(rendered.subject, self._max_bytes)
            if len(subject) > MAX_SUBJECT_BYTES:
                raise MessageError("SUBJECT_TOO_LONG", SUBJECT_TOO_LONG)
            to = _mailbox("To", rendered.head.to_name, address, self._max_bytes)
            head = (
                f"{self._from}To: {to}\r\nSubject: {subject}\r\n"
                f"Date: {format_date(date)}\r\nMessage-ID: {message_id}\r\n"
                f"{self._further_headers(rendered.head)}MIME-Version: 1.0\r\n{self._mark}"
            ).encode()
            parts = [head, *self._content(rendered, self._max_bytes - len(head))]
        except TooLargeError as error:
            raise self._too_large(self._max_bytes + error.over) from None
        if not parts[-1].endswith(b"\r\n"):
            parts.append(b"\r\n")
        size = sum(map(len, parts))
        if size > self._max_bytes:
            raise self._too_large(size, exact=True)
        reply_to = rendered.head.reply_to
        needs_smtputf8 = self._smtputf8 or not address.isascii()
        if reply_to is not None and not reply_to.address.isascii():
            needs_smtputf8 = True
        return Message(b"".join(parts), address, needs_smtputf8)

    def _further_headers(self, head: RenderedHead) -> str:
        """Return Reply-To and the caller's headers.

        Raises:
            TooLargeError: they do not fit.
        """
        if head == _EMPTY_HEAD:
            return ""
        room = self._max_bytes
        lines = [encode_header(name, text, room) for name, text in head.headers]
        if head.reply_to is not None:
            mailbox = _mailbox("Reply-To", *head.reply_to, room)
            lines.insert(0, f"Reply-To: {mailbox}\r\n")
        return "".join(lines)

    def _content(self, rendered: Rendered, room: int) -> list[bytes]:
        """Return the parts after the head: the headers of the content, and the encoded texts.

        Raises:
            TooLargeError: it certainly has more than `room` bytes.
        """
        if rendered.html is None:
            return [self._encode_body(rendered.body or "", room)]
        if rendered.body is None:
            return [self._encode_html(rendered.html, room)]
        room -= len(self._multipart) + len(self._between) + len(self._end)
        body = self._encode_body(rendered.body, room)
        html = self._encode_html(rendered.html, room - len(body))
        return [self._multipart, body, self._between, html, self._end]

    def _text_part(self, text: str, room: int) -> bytes:
        return encode_part("plain", text, self._boundary, room)

    def _html_part(self, text: str, room: int) -> bytes:
        return encode_part("html", text, self._boundary, room)

    def _too_large(self, size: int, *, exact: bool = False) -> MessageError:
        return MessageError("MESSAGE_TOO_LARGE", too_large(size, self._max_bytes, exact=exact))


class _CachingEncoder(Generic[T]):
    """An encoder that caches the result for its last text, unless that text is long."""

    __slots__ = ("_encode", "_encoded", "_text")

    def __init__(self, encode: Callable[[str, int], T]) -> None:
        self._encode = encode
        self._text: str | None = None
        self._encoded: T

    def __call__(self, text: str, room: int) -> T:
        # The cached result was encoded for another `room`, so the caller checks its size.
        if text == self._text:
            return self._encoded
        encoded = self._encode(text, room)
        # Builders are kept for many batches, so long texts would take much memory.
        if len(text) <= MAX_SOURCE_BYTES:
            self._encoded = encoded
            self._text = text
        return encoded


def _mailbox(header: str, display_name: str, address: str, room: int) -> str:
    """Return `name <address>` (RFC 5322, 3.4) for a header, folded if it is long.

    Raises:
        TooLargeError: it has more than `room` bytes.
    """
    name = " ".join(NOT_PRINTABLE.sub(" ", display_name).split()) if display_name else ""
    if not name:
        return address
    if not name.isascii() or "=?" in name or len(name) > _LONGEST_QUOTED_NAME:
        phrase = encoded_words(name, room)
    elif _PLAIN_PHRASE.fullmatch(name):
        phrase = name
    else:
        phrase = '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
    last_line = len(header) + len(": ") + len(phrase) - (phrase.rfind("\n") + 1)
    fold = "\r\n" if last_line + len(address) + len(" <>") > GOOD_LINE else ""
    return f"{phrase}{fold} <{address}>"
