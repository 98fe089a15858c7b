"""The mail itself, as bytes: what a batch shares is built once, what differs is spliced in.

Everything that comes from a row goes through an encoder that cannot leave its place: a header value
holds no line break, and a body cannot hold the boundary. RFC 5322, 2045 to 2047, 6532.
"""

from __future__ import annotations

import binascii
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, TypeVar

from email_validator import EmailNotValidError, validate_email

from shared.templates import BatchTemplate

# RFC 5322, 2.1.1, without the CRLF.
_MAX_LINE = 998
_GOOD_LINE = 78
# `=?utf-8?b?` and `?=` around at most 75 characters (RFC 2047, 2): 45 bytes as base64.
_WORD_BYTES = 45
# The first one stands beside the header's name.
_FIRST_WORD_BYTES = 42
# Nothing that could end the address or the header, or begin another address.
_SAFE_ADDRESS = re.compile(r'[^\s\x00-\x20\x7f()<>\[\]:;@\\,"]+@[^\s\x00-\x20\x7f()<>\[\]:;@\\,"]+')
_ATOM = r"[A-Za-z0-9!#$%&'*+\-/=?^_`{|}~]+"
_PLAIN_PHRASE = re.compile(f"{_ATOM}(?: {_ATOM})*")
_NOT_PRINTABLE = re.compile(r"[\x00-\x1f\x7f]")
_SAFE_MESSAGE_ID = re.compile(r"<[!-;=?-~]+@[!-;=?-~]+>")
# Text that needs an encoding although it is ASCII: no transport keeps these as they are.
_NOT_SEVEN_BIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
# UTF-8: the bytes of a character after its first.
_CONTINUATION_MASK, _CONTINUATION = 0xC0, 0x80
_BASE64_GROWTH = 0.37
_LONGEST_QUOTED_NAME = 60
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

T = TypeVar("T")


class MessageError(Exception):
    """No mail can be built: `reason` is ADDRESS_INVALID, HEADER_INVALID or one of RenderError's."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class Message:
    """One mail, ready for SMTP (dots at line starts are not yet doubled).

    `recipient` is the address for RCPT TO; `needs_smtputf8`: only a server that offers SMTPUTF8
    (RFC 6531) may get it.
    """

    data: bytes
    recipient: str
    needs_smtputf8: bool


def wire_address(address: str) -> str:
    """Return the form of `address` for SMTP: its domain as Punycode if its local part is ASCII.

    An address with a local part beyond ASCII comes back as it is: it needs SMTPUTF8.

    Raises:
        MessageError: ADDRESS_INVALID.
    """
    if not _SAFE_ADDRESS.fullmatch(address):
        raise MessageError("ADDRESS_INVALID", f"{address!r} is no mail address")
    if address.isascii():
        return address
    try:
        checked = validate_email(address, check_deliverability=False)
    except EmailNotValidError as error:
        raise MessageError("ADDRESS_INVALID", f"{address!r}: {error}") from None
    return checked.ascii_email or checked.normalized


def format_date(moment: datetime) -> str:
    """Return an aware time as RFC 5322, 3.3 has it, in UTC."""
    utc = moment.astimezone(UTC)
    return (
        f"{_DAYS[utc.weekday()]}, {utc.day} {_MONTHS[utc.month - 1]} {utc.year:04} "
        f"{utc.hour:02}:{utc.minute:02}:{utc.second:02} +0000"
    )


class MessageBuilder:
    """Builds the mails of one batch. Not for use by two threads at once.

    `sender` is the address for MAIL FROM.
    """

    def __init__(self, sender_email: str, display_name: str, template: BatchTemplate) -> None:
        """Encode what all mails share.

        Raises:
            MessageError: ADDRESS_INVALID, the sender's.
        """
        self.sender = wire_address(sender_email)
        self._smtputf8 = not self.sender.isascii()
        self._template = template
        self._from = f"From: {_mailbox(display_name, self.sender)}\r\n"
        # "=_" stands in no quoted-printable or base64 text (RFC 2045, 6.7), and chance keeps it out
        # of what a row's author could write.
        self._boundary = f"=_{secrets.token_hex(16)}"
        # A text that does not differ between mails is encoded once.
        self._encode_subject = _Remembered(_subject)
        self._encode_body = _Remembered(self._text_part)
        self._encode_html = _Remembered(self._html_part)
        self._multipart = (
            "Content-Type: multipart/alternative;\r\n"
            f' boundary="{self._boundary}"\r\n\r\n--{self._boundary}\r\n'
        ).encode()
        self._between = f"\r\n--{self._boundary}\r\n".encode()
        self._end = f"\r\n--{self._boundary}--\r\n".encode()

    def build(
        self, recipient: str, values: Mapping[str, str], message_id: str, date: datetime
    ) -> Message:
        """Return the mail for one row; `date` is aware, `message_id` from `shared.message_ids`.

        Raises:
            MessageError: ADDRESS_INVALID or HEADER_INVALID.
            RenderError: the row does not fit the template.
        """
        address = wire_address(recipient)
        if not _SAFE_MESSAGE_ID.fullmatch(message_id):
            raise MessageError("HEADER_INVALID", f"{message_id!r} is no Message-ID")
        rendered = self._template.render(values)
        head = (
            f"{self._from}To: {address}\r\nSubject: {self._encode_subject(rendered.subject)}\r\n"
            f"Date: {format_date(date)}\r\nMessage-ID: {message_id}\r\nMIME-Version: 1.0\r\n"
        ).encode()
        needs_smtputf8 = self._smtputf8 or not address.isascii()
        if rendered.html is None:
            data = head + self._encode_body(rendered.body or "")
        elif rendered.body is None:
            data = head + self._encode_html(rendered.html)
        else:
            parts = (
                head,
                self._multipart,
                self._encode_body(rendered.body),
                self._between,
                self._encode_html(rendered.html),
                self._end,
            )
            data = b"".join(parts)
        if not data.endswith(b"\r\n"):
            data += b"\r\n"
        return Message(data, address, needs_smtputf8)

    def _text_part(self, text: str) -> bytes:
        return _part("plain", text, self._boundary)

    def _html_part(self, text: str) -> bytes:
        return _part("html", text, self._boundary)


class _Remembered(Generic[T]):
    """An encoder that remembers its last text."""

    __slots__ = ("_encode", "_encoded", "_text")

    def __init__(self, encode: Callable[[str], T]) -> None:
        self._encode = encode
        self._text = ""
        self._encoded = encode("")

    def __call__(self, text: str) -> T:
        if text != self._text:
            self._encoded = self._encode(text)
            self._text = text
        return self._encoded


def _mailbox(display_name: str, address: str) -> str:
    """Return `name <address>` (RFC 5322, 3.4), folded where it is long."""
    name = " ".join(_NOT_PRINTABLE.sub(" ", display_name).split())
    if not name:
        return address
    if not name.isascii() or "=?" in name or len(name) > _LONGEST_QUOTED_NAME:
        phrase = _encoded_words(name)
    elif _PLAIN_PHRASE.fullmatch(name):
        phrase = name
    else:
        phrase = '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
    last_line = len("From: ") + len(phrase) - (phrase.rfind("\n") + 1)
    fold = "\r\n" if last_line + len(address) + len(" <>") > _GOOD_LINE else ""
    return f"{phrase}{fold} <{address}>"


def _subject(text: str) -> str:
    """Return the value of a Subject header: as it is, folded, or as encoded words (RFC 2047)."""
    if text.isascii() and "=?" not in text and not _NOT_PRINTABLE.search(text):
        if len(text) <= _GOOD_LINE - len("Subject: "):
            return text
        folded = _folded(text)
        if folded is not None:
            return folded
    return _encoded_words(text)


def _folded(text: str) -> str | None:
    """Return `text` broken at single spaces into lines of a good length; None if that cannot be."""
    if "  " in text:
        return None
    lines: list[str] = []
    line = "Subject:"
    for word in text.split(" "):
        if len(line) + 1 + len(word) > _GOOD_LINE:
            lines.append(line)
            line = ""
        line += f" {word}"
        if len(line) > _GOOD_LINE:
            return None
    lines.append(line)
    return "\r\n".join(lines).removeprefix("Subject: ")


def _encoded_words(text: str) -> str:
    """Return `text` as encoded words, one a line; no word ends within a character."""
    data = text.encode("utf-8", "replace")
    words: list[str] = []
    start = 0
    size = _FIRST_WORD_BYTES
    while start < len(data):
        end = start + size
        while end < len(data) and data[end] & _CONTINUATION_MASK == _CONTINUATION:
            end -= 1
        chunk = binascii.b2a_base64(data[start:end], newline=False).decode("ascii")
        words.append(f"=?utf-8?b?{chunk}?=")
        start = end
        size = _WORD_BYTES
    return "\r\n ".join(words)


def _part(subtype: str, text: str, boundary: str) -> bytes:
    """Return the headers and the encoded text of one part; the text's own line ends as CRLF."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _is_seven_bit(text, boundary):
        encoding, data = "7bit", text.replace("\n", "\r\n").encode("ascii")
    else:
        raw = text.encode("utf-8", "replace")
        # Three bytes for one in quoted-printable, four for three in base64: the shorter. The
        # difference of the lengths is about half of the bytes beyond ASCII.
        beyond = 2 * (len(raw) - len(text))
        if 2 * beyond > _BASE64_GROWTH * len(raw):
            encoding, data = "base64", _base64_lines(raw.replace(b"\n", b"\r\n"))
        else:
            encoded = binascii.b2a_qp(raw, quotetabs=False, istext=True)
            encoding, data = "quoted-printable", encoded.replace(b"\n", b"\r\n")
    head = (
        f'Content-Type: text/{subtype}; charset="utf-8"\r\n'
        f"Content-Transfer-Encoding: {encoding}\r\n\r\n"
    )
    return head.encode() + data


def _is_seven_bit(text: str, boundary: str) -> bool:
    return (
        text.isascii()
        and not _NOT_SEVEN_BIT.search(text)
        and (len(text) <= _MAX_LINE or max(map(len, text.split("\n"))) <= _MAX_LINE)
        and boundary not in text
    )


def _base64_lines(data: bytes) -> bytes:
    encoded = binascii.b2a_base64(data, newline=False)
    return b"\r\n".join([encoded[i : i + 76] for i in range(0, len(encoded), 76)])
