"""Sends a group of SMTP commands, and takes their replies without waiting for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from outbox_server.shared.smtp.commands import Answer, Command
from outbox_server.shared.smtp.reply_parser import MalformedReply, WireReply
from outbox_server.shared.smtp.stream import SmtpStream

# "Service not available, closing transmission channel" (RFC 5321, 3.8): most servers reply no more.
_CLOSING: Final = 421
# Limit, in seconds, of a further reply after it.
_CLOSING_LIMIT: Final = 2.0


class Exchange:
    """Commands and their replies, in order.

    If the server offers PIPELINING (RFC 2920), all commands go in one write and each has a reply.
    Otherwise the commands go one by one, up to the first that is not accepted.
    """

    def __init__(
        self, stream: SmtpStream, commands: Sequence[Command], *, pipelining: bool
    ) -> None:
        self._stream = stream
        self._commands = commands
        self._pipelining = pipelining
        self.answers: list[Answer] = []

    def begin(self) -> None:
        """Send the first command, or all of them.

        Raises:
            ConnectionLost: the connection has ended.
            MalformedReply: the server has sent something that is not SMTP.
        """
        sent = self._commands if self._pipelining else self._commands[:1]
        self._stream.write(b"\r\n".join([command.line for command in sent]) + b"\r\n")

    @property
    def due(self) -> Command:
        """The command whose reply comes next."""
        return self._commands[len(self.answers)]

    @property
    def limit(self) -> float:
        """The seconds that the next reply may take."""
        closing = any(answer.reply.code == _CLOSING for answer in self.answers)
        return min(self.due.limit, _CLOSING_LIMIT) if closing else self.due.limit

    @property
    def refusal(self) -> Answer | None:
        """The first reply that refuses. It decides the result even if no further reply comes."""
        return next((answer for answer in self.answers if answer.reply.refuses), None)

    def take(self, reply: WireReply) -> bool:
        """Take the next reply. Return whether it was the last one.

        Raises:
            ConnectionLost: the connection has ended.
            MalformedReply: the reply fits no command.
        """
        answer = Answer(self.due.phase, reply)
        self.answers.append(answer)
        if not answer.accepted:
            if not reply.refuses:
                raise MalformedReply(f"not a reply to {answer.phase}: code {reply.code}")
            if not self._pipelining:
                return True
        if len(self.answers) == len(self._commands):
            return True
        if not self._pipelining:
            self._stream.write(self.due.line + b"\r\n")
        return False
