"""The SMTP commands of a mail, with the parameters of the server's extensions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from outbox_server.shared.smtp.limits import Deadline
from outbox_server.shared.smtp.replies import Phase
from outbox_server.shared.smtp.reply_parser import WireReply
from outbox_server.shared.smtp.stream import SmtpStream

_CONTROL: Final = re.compile(rb"[\x00-\x1f\x7f]")
_MAX_SIZE_DIGITS: Final = 20  # RFC 1870, section 3


class Command(NamedTuple):
    """One command without its line end. Its reply may take `limit` seconds."""

    phase: Phase
    line: bytes
    limit: float


class Answer(NamedTuple):
    """The reply to one command."""

    phase: Phase
    reply: WireReply

    @property
    def accepted(self) -> bool:
        """Whether the server accepted the command: 354 for DATA, 2xx for every other."""
        return self.reply.asks_for_body if self.phase is Phase.DATA else self.reply.accepts


def check_command(line: bytes) -> bytes:
    """Return `line` unchanged.

    Raises:
        ValueError: it contains a control character, which could begin another command.
    """
    if _CONTROL.search(line):
        raise ValueError("an SMTP command must not contain a control character")
    return line


def mail_command(
    sender: str, extensions: Mapping[str, str], *, size: int | None, smtputf8: bool
) -> bytes:
    """Return the MAIL command. `size` is in bytes; None means that the size is not announced.

    Raises:
        ValueError: the address contains a control character.
    """
    line = f"MAIL FROM:<{sender}>"
    if smtputf8:
        line += " SMTPUTF8 BODY=8BITMIME"
    if size is not None and "size" in extensions:
        line += f" SIZE={size}"
    return check_command(line.encode())


def rcpt_command(recipient: str) -> bytes:
    """Return the RCPT command.

    Raises:
        ValueError: the address contains a control character.
    """
    return check_command(f"RCPT TO:<{recipient}>".encode())


def size_limit(extensions: Mapping[str, str]) -> int | None:
    """Return the size of the largest message that the server accepts, in bytes (RFC 1870).

    None means that the server states no limit.
    """
    text = extensions.get("size", "").strip()
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_SIZE_DIGITS):
        return None
    return int(text) or None


async def reply_within(
    stream: SmtpStream, limit: float, deadline: Deadline, what: str
) -> WireReply:
    """Return the next reply. `what` names the command or step in the error message.

    Raises:
        TimeoutError: it took longer than `limit` seconds, or the deadline has passed.
        ConnectionLost: the connection ended.
        MalformedReply: the server does not speak SMTP.
    """
    try:
        return await stream.reply(limit, deadline)
    except TimeoutError:
        raise TimeoutError(f"no reply to {what} in time") from None
