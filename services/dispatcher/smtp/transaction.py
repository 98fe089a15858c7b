"""Sends one mail over one open session: MAIL, RCPT, DATA, body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from outbox_server.services.dispatcher.smtp.lease import Lease
from outbox_server.services.dispatcher.smtp.result import Envelope, GivenBackError
from outbox_server.services.dispatcher.smtp.session import KeptSession
from outbox_server.shared.smtp.commands import (
    Answer,
    Command,
    mail_command,
    rcpt_command,
    reply_within,
)
from outbox_server.shared.smtp.limits import PhaseLimits
from outbox_server.shared.smtp.replies import Phase
from outbox_server.shared.smtp.reply_parser import MalformedReply

_END: Final = b".\r\n"
_BLOCK_BYTES: Final = 64 * 1024


class Transaction:
    """Sends one mail, and knows at any moment how much of it the server may have received."""

    def __init__(
        self,
        session: KeptSession,
        limits: PhaseLimits,
        lease: Lease,
        may_begin: Callable[[], bool],
    ) -> None:
        self._session = session
        self._stream = session.stream
        self._limits = limits
        self._lease = lease
        self._may_begin = may_begin
        # Whether the first byte of the body, and its final dot, were written.
        self.body_begun = False
        self.end_written = False

    async def run(self, envelope: Envelope) -> Answer:
        """Return the reply that decides: the first refusal, or the one to the body.

        Raises:
            GivenBackError: after 354, `may_begin` returned False or the lease had ended.
            TimeoutError: a phase took longer than its limit, or the lease ended.
            ConnectionLost: the connection ended.
            MalformedReply: the server does not speak SMTP.
        """
        await self._session.wait_for_reset(self._lease)
        refusal = await self._announce(envelope)
        if refusal is not None:
            return refusal
        # Only a body may follow 354, so giving up here costs the connection.
        self._session.in_body = True
        if not (self._may_begin() and self._lease.holds):
            raise GivenBackError
        if self._stream.unread:
            raise MalformedReply("a reply without a command")
        self.body_begun = True
        answer = await self._send(envelope.data)
        self._session.in_body = not self.end_written
        return answer

    async def _announce(self, envelope: Envelope) -> Answer | None:
        """Send MAIL, RCPT and DATA. Return the first refusal, or None if the body may follow."""
        session, limits = self._session, self._limits
        mail = mail_command(
            envelope.mail_from,
            session.extensions,
            size=len(envelope.data),
            smtputf8=envelope.needs_smtputf8,
        )
        commands = (
            Command(Phase.MAIL, mail, limits.mail),
            Command(Phase.RCPT, rcpt_command(envelope.rcpt_to), limits.rcpt),
            Command(Phase.DATA, b"DATA", limits.data),
        )
        session.mails += 1
        answers = await session.exchange(commands, self._lease)
        refusal = next((answer for answer in answers if not answer.accepted), None)
        if refusal is not None and answers[-1].phase is Phase.DATA and answers[-1].accepted:
            # The server awaits a body although it refused MAIL or RCPT. If it accepted the
            # recipient, a lone dot would deliver an empty mail; otherwise it refuses the dot.
            recipient_accepted = answers[1].accepted
            session.in_body, session.needs_dot = recipient_accepted, not recipient_accepted
        return refusal

    async def _send(self, data: bytes) -> Answer:
        """Send the body and return the reply to it, which may come before the end of the body."""
        # Not by a regular expression: a long body of dots would block the event loop for a second.
        data = data.replace(b"\n.", b"\n..")
        if data.startswith(b"."):
            data = b"." + data
        if len(data) <= _BLOCK_BYTES:
            self.end_written = True
            self._stream.write(data + _END)
        elif not await self._send_blocks(memoryview(data)):
            early = self._stream.take()
            if not early.refuses:
                raise MalformedReply(f"a reply before the end of the body: code {early.code}")
            return Answer(Phase.BODY, early)
        reply = await reply_within(
            self._stream, self._limits.end, self._lease, "the end of the body"
        )
        if not (reply.accepts or reply.refuses):
            raise MalformedReply(f"not a reply to a body: code {reply.code}")
        return Answer(Phase.BODY, reply)

    async def _send_blocks(self, data: memoryview) -> bool:
        """Write the body as fast as the server accepts it. Return False if it replied too early."""
        last = (len(data) - 1) // _BLOCK_BYTES * _BLOCK_BYTES
        for start in range(0, last, _BLOCK_BYTES):
            self._stream.write(data[start : start + _BLOCK_BYTES])
            await self._until_writable()
            if self._stream.unread:
                return False
        # From here on the server may have received all of it, whatever happens next.
        self.end_written = True
        self._stream.write(bytes(data[last:]) + _END)
        await self._until_writable()
        return True

    async def _until_writable(self) -> None:
        if self._stream.writable:
            return
        try:
            await self._stream.writable_or_reply(self._limits.block, self._lease)
        except TimeoutError:
            raise TimeoutError("the server accepts no more of the body") from None
