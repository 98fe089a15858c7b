"""Parses the bytes that an SMTP server sends into replies. Pure."""

from __future__ import annotations

import re
from collections import deque
from typing import Final, NamedTuple

# RFC 5321 allows 512 bytes per line. Real servers send more, but not more than this.
MAX_LINE_BYTES: Final = 8 * 1024
MAX_REPLY_BYTES: Final = 32 * 1024
# A line of a reply. The first digit of its code is as in RFC 5321, 4.2.1.
_LINE: Final = re.compile(rb"([2-5][0-9][0-9])(?:([ \t-])[ \t]*+|(?=\r?\n))([^\n]*+)\n")
# The first digit of a code.
SUCCESS: Final = 2
CONTINUES: Final = 3
TEMPORARY_REFUSAL: Final = 4
_START_INPUT: Final = 354


class MalformedReply(Exception):
    """The server sent something that is not SMTP. Nothing that it sends later can be trusted."""


class WireReply(NamedTuple):
    """A reply as the server sent it. If it has several lines, the last line gives the code.

    The properties say whether the protocol continues (RFC 5321, 4.2.1: the first digit of a code
    decides, whether the code is known or not). `shared.smtp.replies` decides what a refusal means.
    """

    code: int
    text: str

    @property
    def accepts(self) -> bool:
        """Whether the command was carried out."""
        return self.code // 100 == SUCCESS

    @property
    def asks_for_body(self) -> bool:
        """Whether the server waits for a body."""
        return self.code == _START_INPUT

    @property
    def refuses(self) -> bool:
        """Whether the command was refused, temporarily or permanently."""
        return self.code // 100 >= TEMPORARY_REFUSAL

    def __str__(self) -> str:
        return f"{self.code} {self.text}"


class ReplyParser:
    """Takes bytes in any pieces and puts complete replies into `replies`."""

    def __init__(self) -> None:
        self.replies: deque[WireReply] = deque()
        self._rest = b""
        self._lines: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> None:
        """Read more bytes.

        Blank lines before and within a reply are skipped, because some servers send them.

        Raises:
            MalformedReply: the bytes are not SMTP, or a line or reply is too long. The complete
                replies before it are in `replies`.
        """
        if self._rest:
            data = self._rest + data
        start = 0
        while start < len(data):
            found = _LINE.match(data, start)
            end = data.find(b"\n", start) + 1 if found is None else found.end()
            if not end:
                break
            self._check_size(end - start)
            if found is not None:
                self._take_line(*found.groups())
            elif data[start:end].strip():
                # The error does not quote the line, because users read it, and it may be the banner
                # of another service.
                raise MalformedReply("the server does not speak SMTP")
            start = end
        self._rest = data[start:]
        if len(self._rest) > MAX_LINE_BYTES:
            raise MalformedReply(f"a line of more than {MAX_LINE_BYTES} bytes")

    def clear(self) -> None:
        """Discard everything that was received and not yet taken."""
        self.replies.clear()
        self._lines.clear()
        self._rest, self._size = b"", 0

    def _take_line(self, code: bytes, mark: bytes | None, text: bytes) -> None:
        text = text.rstrip()
        if mark == b"-":
            self._lines.append(text)
            return
        if self._lines:
            text = b"\n".join((*self._lines, text))
            self._lines.clear()
        self.replies.append(WireReply(int(code), text.decode("utf-8", "replace")))
        self._size = 0

    def _check_size(self, line: int) -> None:
        self._size += line
        if line > MAX_LINE_BYTES:
            raise MalformedReply(f"a line of more than {MAX_LINE_BYTES} bytes")
        if self._size > MAX_REPLY_BYTES:
            raise MalformedReply(f"a reply of more than {MAX_REPLY_BYTES} bytes")
