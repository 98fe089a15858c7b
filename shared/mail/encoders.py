"""Encodes the texts of a mail (RFC 2045 to 2047) within a limit of bytes.

`room` is the number of bytes that a result may have. If a lower bound of the size shows that a text
does not fit, it is refused before it is encoded. The caller checks the size of the result.
"""

from __future__ import annotations

import binascii
import re

from outbox_server.shared.mail_headers import is_encodable

# RFC 5322, 2.1.1, without the CRLF.
_MAX_LINE = 998
GOOD_LINE = 78
# `=?utf-8?b?` and `?=` around at most 75 characters (RFC 2047, 2): 45 bytes as base64.
_WORD_BYTES = 45
# The first word shares its line with the header's name.
_FIRST_WORD_BYTES = 42
# More bytes than a character has.
_LEAST_WORD_BYTES = 6
_ENCODED_LINE = 76
# The bytes around the base64 of a word, and between two words.
_AROUND_WORD, _BETWEEN_WORDS = len("=?utf-8?b??="), len("\r\n ")
# A longer subject is written as encoded words, because a list of its words takes much memory.
_LONGEST_FOLDED = 2_000
NOT_PRINTABLE = re.compile(r"[\x00-\x1f\x7f]")
# ASCII characters that need an encoding, because transports may change them.
_NOT_SEVEN_BIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
# Bytes that quoted-printable always writes as three bytes (RFC 2045, 6.7).
_QUOTED = bytes({*range(32), ord("="), *range(127, 256)} - set(b"\t\n"))
# The bytes of a UTF-8 character after its first.
_CONTINUATION_MASK, _CONTINUATION = 0xC0, 0x80
_BASE64_LINE = 76
# A space where a header may be folded.
_LONE_SPACE = re.compile(r"(?<! ) (?! )")


class TooLargeError(Exception):
    """The result would have at least `over` bytes more than its room."""

    def __init__(self, over: int) -> None:
        super().__init__(over)
        self.over = over


def check_room(size: int, room: int) -> None:
    """Check that a result of at least `size` bytes fits.

    Raises:
        TooLargeError: it does not fit.
    """
    if size > room:
        raise TooLargeError(size - room)


def encode_subject(text: str, room: int) -> str:
    """Return the value of a Subject header: unchanged, folded, or as encoded words (RFC 2047).

    Raises:
        TooLargeError: it does not fit.
    """
    check_room(len(text), room)
    if (
        len(text) <= _LONGEST_FOLDED
        and text.isascii()
        and "=?" not in text
        and not NOT_PRINTABLE.search(text)
    ):
        if len(text) <= GOOD_LINE - len("Subject: "):
            return text
        folded = _folded(text)
        if folded is not None:
            return folded
    return encoded_words(text, room)


def encode_header(name: str, text: str, room: int) -> str:
    """Return a header of the caller, with its name and line ends.

    A text beyond ASCII becomes encoded words (RFC 2047). Any other is folded at its spaces, and has
    no line of more than 998 bytes, because `shared.mail_headers` limits it.

    Raises:
        TooLargeError: it does not fit.
    """
    check_room(len(text), room)
    if not text.isascii() or (is_encodable(name) and "=?" in text):
        # RFC 2047, 2: a line with encoded words has at most 76 characters. Only a very long name
        # makes it longer, because not every program accepts a first line with a name alone.
        first = (_ENCODED_LINE - len(f"{name}: ") - _AROUND_WORD) // 4 * 3
        words = encoded_words(text, room, max(first, _LEAST_WORD_BYTES))
        return f"{name}: {words}\r\n"
    lines: list[str] = []
    line = f"{name}:"
    for word in _LONE_SPACE.split(text):
        # A long first word stays on the line of the name, which must not be empty.
        is_first = not lines and len(line) == len(name) + 1
        if not is_first and len(line) + 1 + len(word) > GOOD_LINE:
            lines.append(line)
            line = ""
        line += f" {word}"
    return "\r\n".join([*lines, line]) + "\r\n"


def _folded(text: str) -> str | None:
    """Return `text` folded at single spaces into lines of at most 78 bytes, or None if it fails."""
    if "  " in text:
        return None
    lines: list[str] = []
    line = "Subject:"
    for word in text.split(" "):
        if len(line) + 1 + len(word) > GOOD_LINE:
            lines.append(line)
            line = ""
        line += f" {word}"
        if len(line) > GOOD_LINE:
            return None
    lines.append(line)
    return "\r\n".join(lines).removeprefix("Subject: ")


def encoded_words(text: str, room: int, first_bytes: int = _FIRST_WORD_BYTES) -> str:
    """Return `text` as encoded words, one per line. No word ends within a character.

    The first word has at most `first_bytes`, besides the encoding.

    Raises:
        TooLargeError: they do not fit.
    """
    data = text.encode("utf-8", "replace")
    least_words = -(-len(data) // _WORD_BYTES)
    between = max(0, least_words - 1) * _BETWEEN_WORDS
    check_room(_base64_size(len(data)) + least_words * _AROUND_WORD + between, room)
    words: list[str] = []
    start = 0
    size = first_bytes
    while start < len(data):
        end = start + size
        while end < len(data) and data[end] & _CONTINUATION_MASK == _CONTINUATION:
            end -= 1
        chunk = binascii.b2a_base64(data[start:end], newline=False).decode("ascii")
        words.append(f"=?utf-8?b?{chunk}?=")
        start = end
        size = _WORD_BYTES
    return "\r\n ".join(words)


def encode_part(subtype: str, text: str, boundary: str, room: int) -> bytes:
    """Return the headers and the encoded text of one part, with CRLF at the end of each line.

    Raises:
        TooLargeError: it does not fit.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    line_breaks = text.count("\n")
    check_room(len(text) + line_breaks, room)
    if _is_seven_bit(text, boundary):
        encoding, data = "7bit", text.replace("\n", "\r\n").encode("ascii")
    else:
        encoding, data = _encode_bytes(text.encode("utf-8", "replace"), line_breaks, room)
    head = (
        f'Content-Type: text/{subtype}; charset="utf-8"\r\n'
        f"Content-Transfer-Encoding: {encoding}\r\n\r\n"
    )
    return head.encode() + data


def _encode_bytes(raw: bytes, line_breaks: int, room: int) -> tuple[str, bytes]:
    """Return the name and the result of the shorter encoding: quoted-printable or base64."""
    size = len(raw) + line_breaks
    check_room(size, room)
    # Quoted-printable writes three bytes for one, base64 four for three. Soft line breaks are not
    # counted, because there are few.
    least_quoted = size + 2 * (len(raw) - len(raw.translate(None, _QUOTED)))
    base64_size = _base64_size(size)
    base64_size += (base64_size - 1) // _BASE64_LINE * len("\r\n")
    check_room(min(least_quoted, base64_size), room)
    if base64_size < least_quoted:
        return "base64", _base64_lines(raw.replace(b"\n", b"\r\n"))
    encoded = binascii.b2a_qp(raw, quotetabs=False, istext=True)
    return "quoted-printable", encoded.replace(b"\n", b"\r\n")


def _base64_size(size: int) -> int:
    return -(-size // 3) * 4


def _is_seven_bit(text: str, boundary: str) -> bool:
    return (
        text.isascii()
        and not _NOT_SEVEN_BIT.search(text)
        and (len(text) <= _MAX_LINE or max(map(len, text.split("\n"))) <= _MAX_LINE)
        and boundary not in text
    )


def _base64_lines(data: bytes) -> bytes:
    encoded = binascii.b2a_base64(data, newline=False)
    return b"\r\n".join(
        [encoded[i : i + _BASE64_LINE] for i in range(0, len(encoded), _BASE64_LINE)]
    )
