"""An SMTP session that is kept open between mails."""

from __future__ import annotations

from typing import Any, Final

from outbox_server.shared.smtp.commands import reply_within
from outbox_server.shared.smtp.limits import FixedDeadline
from outbox_server.shared.smtp.replies import Phase
from outbox_server.shared.smtp.reply_parser import WireReply
from outbox_server.shared.smtp.session import QUIT_LIMIT, SESSION_ERRORS, SmtpSession
from outbox_server.shared.smtp.stream import ConnectionLost

# Limit of the reply to RSET. A server that takes longer gets a new connection.
_RESET_LIMIT_S: Final = 5.0


class KeptSession(SmtpSession):
    """An SMTP session that can carry several mails and knows how to end.

    `opened_at` and `idle_since` are seconds of the pool's clock.
    """

    def __init__(self, *arguments: Any, opened_at: float, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        # The number of mails that were begun with MAIL.
        self.mails = 0
        self.opened_at = opened_at
        self.idle_since = opened_at
        # The session was opened and can carry mail.
        self.ready = False
        # The server waits for a body that will not come. A lone dot ends it (RFC 2920, 3.1).
        self.needs_dot = False
        # The server waits for a body, and a lone dot would be an empty mail. Only closing the
        # connection ends it.
        self.in_body = False
        self._owes_reset = False

    @property
    def sent_unsolicited_reply(self) -> bool:
        """Whether the server has sent a reply without a command, as it may before it closes."""
        if self._owes_reset and self.stream.unread:
            self._owes_reset = False
            return not self.stream.take().accepts or self.stream.unread
        return self.stream.unread

    def reset(self) -> None:
        """Send RSET after a mail was refused. The reply is read before the next mail."""
        try:
            self.stream.write(b"RSET\r\n")
        except SESSION_ERRORS:
            # Closed, or the server sent something after its refusal that is not a reply: the pool
            # drops the session.
            return
        self._owes_reset = True

    @property
    def owes_reset(self) -> bool:
        """Whether the reply to RSET was not read yet."""
        return self._owes_reset

    def limit_reset(self) -> None:
        """Limit the wait for the reply to RSET."""
        self.stream.limit(_RESET_LIMIT_S)

    def take_reset(self, reply: WireReply) -> None:
        """Take the reply to RSET.

        Raises:
            ConnectionLost: RSET was refused. This says nothing about the next mail.
        """
        self._owes_reset = False
        if not reply.accepts:
            raise ConnectionLost(f"RSET was refused: {reply}")

    async def end(self) -> None:
        """End the session as its state requires: by QUIT if the server expects a command."""
        if self.in_body or not self.stream.connected:
            self.abort()
            return
        deadline = FixedDeadline(QUIT_LIMIT)
        try:
            if self._owes_reset:
                await reply_within(self.stream, QUIT_LIMIT, deadline, "RSET")
            if self.needs_dot:
                self.stream.write(b".\r\n")
                await reply_within(self.stream, QUIT_LIMIT, deadline, Phase.BODY)
        except SESSION_ERRORS:
            self.abort()
            return
        await self.quit(deadline)
