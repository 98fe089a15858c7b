"""Sends one mail over one open session: MAIL, RCPT, DATA, body.

It is driven by the events of the connection. A mail needs no task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from outbox_server.services.dispatcher.smtp.lease import Lease
from outbox_server.services.dispatcher.smtp.result import Envelope, GivenBackError
from outbox_server.services.dispatcher.smtp.session import KeptSession
from outbox_server.shared.smtp.commands import Answer, Command, mail_command, rcpt_command
from outbox_server.shared.smtp.exchange import Exchange
from outbox_server.shared.smtp.limits import PhaseLimits
from outbox_server.shared.smtp.replies import Phase
from outbox_server.shared.smtp.reply_parser import MalformedReply, WireReply
from outbox_server.shared.smtp.session import SESSION_ERRORS
from outbox_server.shared.smtp.stream import ConnectionLost

_END: Final = b".\r\n"
_BLOCK_BYTES: Final = 64 * 1024
_NOTHING: Final = memoryview(b"")


class Transaction:
    """Sends one mail, and knows at any moment how much of it the server may have received.

    `ended` is called once, with the reply that decides (the first refusal, or the one to the body)
    or with an error:

    - GivenBackError: after 354, `may_begin` returned False or the lease had ended.
    - TimeoutError: a phase took longer than its limit, or the lease ended.
    - ConnectionLost: the connection ended.
    - MalformedReply: the server does not speak SMTP.
    - ValueError: an address contains a control character. Nothing was sent.
    """

    def __init__(
        self,
        session: KeptSession,
        envelope: Envelope,
        *,
        limits: PhaseLimits,
        lease: Lease,
        may_begin: Callable[[], bool],
        ended: Callable[[Answer | Exception], None],
    ) -> None:
        self._session = session
        self._stream = session.stream
        self._envelope = envelope
        self._limits = limits
        self._lease = lease
        self._may_begin = may_begin
        self._ended = ended
        # The step under way: it takes what has arrived, and returns the deciding reply once it is
        # there. None means that it waits for more.
        self._step: Callable[[], Answer | None] = self._announce
        self._exchange: Exchange | None = None
        # What is left of a long body.
        self._left = _NOTHING
        # The error message if the server does nothing now.
        self._awaited = ""
        self._running = False
        # Whether the first byte of the body, and its final dot, were written.
        self.body_begun = False
        self.end_written = False

    def start(self) -> None:
        """Begin to send. `ended` may be called before this returns."""
        self._stream.listen(self._go_on, self._lease)
        if self._session.owes_reset:
            self._session.limit_reset()
            self._step = self._await_reset
        self._go_on()

    def stop(self) -> None:
        """Send no more, and do not call `ended`. The connection must be closed then."""
        self._stream.stop_listening()

    def _go_on(self) -> None:
        """Continue after an event of the connection."""
        if self._running:
            return  # a step has ended its own lease, and looks at it
        self._running = True
        end: Answer | Exception | None
        try:
            end = self._step()
            if end is None:
                self._stream.raise_if_over()
                return
        except TimeoutError:
            end = TimeoutError(self._awaited)
        except Exception as error:  # noqa: BLE001 - `ended` gets every error
            end = error
        finally:
            self._running = False
        self._stream.stop_listening()
        self._ended(end)

    # The steps, in their order ---------------------------------------------------------------

    def _await_reset(self) -> Answer | None:
        try:
            if not self._stream.unread:
                self._stream.raise_if_over()
                return None
        except TimeoutError:
            # It counts as a lost connection, because it says nothing about the mail.
            raise ConnectionLost("no reply to RSET in time") from None
        self._session.take_reset(self._stream.take())
        return self._announce()

    def _announce(self) -> Answer | None:
        """Send MAIL, RCPT and DATA."""
        envelope, limits = self._envelope, self._limits
        mail = mail_command(
            envelope.mail_from,
            self._session.extensions,
            size=len(envelope.data),
            smtputf8=envelope.needs_smtputf8,
        )
        self._exchange = self._session.exchange_of(
            (
                Command(Phase.MAIL, mail, limits.mail),
                Command(Phase.RCPT, rcpt_command(envelope.rcpt_to), limits.rcpt),
                Command(Phase.DATA, b"DATA", limits.data),
            )
        )
        self._session.mails += 1
        self._session.phase = Phase.MAIL
        self._exchange.begin()
        self._await_command(self._exchange)
        self._step = self._take_answers
        return self._take_answers()

    def _take_answers(self) -> Answer | None:
        exchange = self._exchange
        if exchange is None:
            raise RuntimeError("no command was sent")
        try:
            taken = False
            while self._stream.unread:
                if exchange.take(self._stream.take()):
                    return self._refusal(exchange) or self._begin_body()
                taken = True
            if taken:
                self._await_command(exchange)
            self._stream.raise_if_over()
        except SESSION_ERRORS:
            if exchange.refusal is None:
                raise
            # The other replies will not come, and need not: the mail was refused before. The
            # connection cannot be used, because the server may still send one of them.
            self._session.abort()
            return exchange.refusal
        return None

    def _await_command(self, exchange: Exchange) -> None:
        self._await(f"no reply to {exchange.due.phase} in time", exchange.limit)

    def _refusal(self, exchange: Exchange) -> Answer | None:
        """Return the first refusal, or None if the body may follow."""
        answers, refusal = exchange.answers, exchange.refusal
        if refusal is not None and answers[-1].phase is Phase.DATA and answers[-1].accepted:
            # The server awaits a body although it refused MAIL or RCPT. If it accepted the
            # recipient, a lone dot would deliver an empty mail; otherwise it refuses the dot.
            recipient_accepted = answers[1].accepted
            self._session.in_body = recipient_accepted
            self._session.needs_dot = not recipient_accepted
        return refusal

    def _begin_body(self) -> Answer | None:
        """Send the body, or its first block."""
        # Only a body may follow 354, so giving up here costs the connection.
        self._session.in_body = True
        if not (self._may_begin() and self._lease.holds):
            raise GivenBackError
        if self._stream.unread:
            return self._early(Phase.DATA, "a reply without a command")
        # Nothing of a body reaches a server whose connection has ended.
        self._stream.raise_if_ended()
        self.body_begun = True
        # Not by a regular expression: a long body of dots would block the event loop for a second.
        data = self._envelope.data.replace(b"\n.", b"\n..")
        if data.startswith(b"."):
            data = b"." + data
        if len(data) > _BLOCK_BYTES:
            self._left = memoryview(data)
            self._step = self._write_blocks
            return self._write_blocks()
        self.end_written = True
        self._stream.write(data + _END)
        return self._await_end()

    def _write_blocks(self) -> Answer | None:
        """Write a long body as fast as the server accepts it."""
        stream = self._stream
        if stream.unread:
            return self._early(Phase.BODY, "a reply before the end of the body")
        while len(self._left) > _BLOCK_BYTES:
            stream.write(self._left[:_BLOCK_BYTES])
            self._left = self._left[_BLOCK_BYTES:]
            if not stream.writable:
                self._step = self._await_room
                self._await("the server accepts no more of the body", self._limits.block)
                return None
        # If this raises, the end was not written, and the server has no mail.
        stream.raise_if_ended()
        # From here on the server may have received all of it, whatever happens next.
        self.end_written = True
        stream.write(bytes(self._left) + _END)
        self._left = _NOTHING
        if stream.writable:
            return self._await_end()
        self._step = self._await_room
        self._await("the server accepts no more of the body", self._limits.block)
        return None

    def _await_room(self) -> Answer | None:
        if self.end_written:
            if self._stream.writable or self._stream.unread:
                return self._await_end()
            return None
        if self._stream.writable or self._stream.unread:
            return self._write_blocks()
        return None

    def _early(self, phase: Phase, what: str) -> Answer:
        """Return a refusal that came before the end of the body, such as a 421.

        Raises:
            MalformedReply: the reply refuses nothing. `what` names it.
        """
        early = self._stream.take()
        if not early.refuses:
            raise MalformedReply(f"{what}: code {early.code}")
        return Answer(phase, early)

    def _await_end(self) -> Answer | None:
        self._step = self._take_end
        if not self._stream.unread:
            self._await("no reply to the end of the body in time", self._limits.end)
        return self._take_end()

    def _take_end(self) -> Answer | None:
        return self._body_answer(self._stream.take()) if self._stream.unread else None

    def _body_answer(self, reply: WireReply) -> Answer:
        if not (reply.accepts or reply.refuses):
            raise MalformedReply(f"not a reply to a body: code {reply.code}")
        self._session.in_body = False
        return Answer(Phase.BODY, reply)

    def _await(self, message: str, seconds: float) -> None:
        """Limit the wait for the server. `message` is the error once the time is over."""
        self._awaited = message
        self._stream.limit(seconds)
