"""One attempt to send a mail: over a kept connection and, if that one fails, over a new one.

It is driven by the events of its connection. Only opening or replacing a connection is a task.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import structlog

from outbox_server.services.dispatcher.smtp.endpoint_pool import EndpointPool, Place, Waiter
from outbox_server.services.dispatcher.smtp.lease import Lease
from outbox_server.services.dispatcher.smtp.result import (
    OPENING,
    Envelope,
    GivenBackError,
    SendResult,
    outcome_of,
)
from outbox_server.services.dispatcher.smtp.session import KeptSession
from outbox_server.services.dispatcher.smtp.transaction import Transaction
from outbox_server.shared.oauth2.credentials import TokenRefused, TokenUnavailable
from outbox_server.shared.smtp.commands import Answer, size_limit
from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.smtp.limits import PhaseLimits
from outbox_server.shared.smtp.replies import (
    Phase,
    Reply,
    ReplyRules,
    leaves_session_usable,
    split_enhanced_code,
)
from outbox_server.shared.smtp.session import SESSION_ERRORS, SessionRefused
from outbox_server.shared.smtp.stream import ConnectionLost
from outbox_server.shared.states import AttemptOutcome, ReplyClass

# Refusals that concern more than the mail: the session cannot carry another mail either.
_ENDS_SESSION: Final = frozenset(
    {ReplyClass.SESSION, ReplyClass.CONNECTIONS, ReplyClass.AUTH, ReplyClass.ACCOUNT}
)
# Refusals that may be due to a limit of connections, although the server does not say so.
_POSSIBLY_TOO_MANY: Final = frozenset({ReplyClass.SESSION, ReplyClass.TEMPORARY})
_BEFORE_RCPT: Final = OPENING | {Phase.MAIL}
_log = structlog.get_logger(__name__)


class SendAttempt:
    """Sends one mail. The outcome depends on the replies and on how much of the mail was sent.

    `ended` is called once: with the result, with GivenBackError (the send may not begin, and the
    server has no part of the body), or with the error of a programming mistake. `spawn` runs a
    coroutine as a task.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        envelope: Envelope,
        pool: EndpointPool,
        new_session: Callable[[], KeptSession],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        *,
        limits: PhaseLimits,
        rules: ReplyRules,
        lease: Lease,
        may_begin: Callable[[], bool],
        ended: Callable[[SendAttempt, SendResult | Exception], None],
    ) -> None:
        self._endpoint = endpoint
        self._envelope = envelope
        self._pool = pool
        self._new_session = new_session
        self._spawn = spawn
        self._limits = limits
        self._rules = rules
        self._lease = lease
        self._may_begin = may_begin
        self._ended = ended
        self._started = 0.0
        self._body_begun = False
        # What the attempt waits for now: a place, a task, or the transaction.
        self._waiter: Waiter | None = None
        self._task: asyncio.Task[None] | None = None
        self._transaction: Transaction | None = None
        # The connection in use. None means that the attempt only has a place for a connection.
        self._session: KeptSession | None = None
        # Whether the session was kept, and what it had carried and for how long it was idle then.
        self._kept = False
        self._idled = False
        self._earlier_mails = 0
        # Mails that the kept connection carried before its server refused another one.
        self._carried: int | None = None
        # The refusal on the kept connection, because of which the mail is tried on a new
        # connection.
        self._refusal: SendResult | None = None

    def start(self) -> None:
        """Begin. `ended` may be called before this returns."""
        if self._may_go_on():
            self._waiter = self._pool.acquire(self._lease, self._take_place)
        else:
            self._ended(self, GivenBackError())

    def cancel(self) -> None:
        """Stop now, close the connection, and do not call `ended`."""
        if self._task is not None:
            self._task.cancel()
        elif self._waiter is not None:
            self._pool.leave(self._waiter)
        elif self._transaction is not None:
            self._transaction.stop()
            self._pool.drop(self._session)

    def _may_go_on(self) -> bool:
        return self._may_begin() and self._lease.holds

    def _take_place(self, place: Place | GivenBackError) -> None:
        self._waiter = None
        if isinstance(place, GivenBackError):
            self._ended(self, place)
        elif not self._may_begin():
            self._pool.hand_back(place)
            self._ended(self, GivenBackError())
        else:
            self._session = place
            self._lease.begun = True
            self._started = time.monotonic()
            if place is None:
                self._open()
            else:
                self._kept, self._idled = True, self._pool.was_idling(place)
                self._hand_over(place)

    # Connections -----------------------------------------------------------------------------

    def _open(self, kept: KeptSession | None = None) -> None:
        """Open a connection in a task, in place of a kept one if there is one."""
        self._task = self._spawn(self._open_new(kept))
        self._task.add_done_callback(self._opening_ended)

    def _opening_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self._pool.drop(self._session)

    async def _open_new(self, kept: KeptSession | None) -> None:
        try:
            if kept is not None:
                await self._pool.replace(kept)
            session = self._begin_session()
            await session.open(self._lease)
        except SessionRefused as refused:
            self._task = None
            self._take_answer(session, Answer(refused.phase, refused.reply))
        except Exception as error:  # noqa: BLE001 - `ended` gets every error
            self._task = None
            self._fail(error)
        else:
            self._task = None
            self._pool.opened(session)
            self._hand_over(session)

    def _begin_session(self) -> KeptSession:
        """Return a new session, in place of a kept one.

        Raises:
            GivenBackError: the send may not begin.
        """
        self._session = self._transaction = None
        self._kept, self._earlier_mails = False, 0
        if not self._may_go_on():
            raise GivenBackError
        self._session = self._new_session()
        return self._session

    def _hand_over(self, session: KeptSession) -> None:
        """Send the mail over an open session, unless the server cannot take it."""
        self._earlier_mails = session.mails
        refusal = self._refuse(session)
        if refusal is not None:
            self._ended(self, refusal)
            return
        if not self._pool.trusts_pipelining:
            session.extensions.pop("pipelining", None)
        transaction = self._transaction = Transaction(
            session,
            self._envelope,
            limits=self._limits,
            lease=self._lease,
            may_begin=self._may_begin,
            ended=self._transaction_ended,
        )
        transaction.start()

    # How a mail ends -------------------------------------------------------------------------

    def _transaction_ended(self, end: Answer | Exception) -> None:
        transaction, session = self._transaction, self._session
        if transaction is None or session is None:
            raise RuntimeError("a transaction without a session has ended")
        self._body_begun |= transaction.body_begun
        if isinstance(end, Answer):
            self._take_answer(session, end)
            return
        if isinstance(end, SESSION_ERRORS) and self._lease.holds:
            # A kept connection may be closed because it was idle, whatever pipelining does.
            idled = self._earlier_mails > 0 and isinstance(end, ConnectionLost)
            if not (transaction.body_begun or idled):
                self._pool.distrust_pipelining()
            if self._kept and not self._body_begun:
                # The server closed the connection while it was idle, or has forgotten it. That
                # says nothing about the server or the mail. Without QUIT: the server may still
                # owe a reply.
                session.abort()
                self._open(session)
                return
        self._fail(end)

    def _take_answer(self, session: KeptSession, answer: Answer) -> None:
        try:
            result = self._result_of(answer, self._earlier_mails)
        except Exception as error:  # noqa: BLE001 - `ended` gets every error
            self._fail(error)
            return
        reply_class = result.reply_class
        if self._kept and reply_class is ReplyClass.SESSION:
            self._carried = None if self._idled else self._earlier_mails
            self._refusal = result
            self._open(session)
            return
        if not self._kept:
            if reply_class in _POSSIBLY_TOO_MANY and answer.phase in _BEFORE_RCPT:
                self._pool.may_be_too_many(session)
            if reply_class is ReplyClass.SENT and self._carried:
                self._pool.learn_mails(self._carried)
        try:
            self._release(session, answer, result)
        except Exception as error:  # noqa: BLE001 - the mail has ended, whatever the session does
            _log.exception("session_not_released", error=type(error).__name__)
            self._pool.drop(session)
        self._ended(self, result)

    def _fail(self, error: Exception) -> None:
        """End the attempt with an error that is not a reply of the server."""
        if isinstance(error, SESSION_ERRORS):
            self._ended(self, self._broken(error))
            return
        self._pool.drop(self._session)
        if isinstance(error, TokenRefused):
            # The account was refused. The server was not asked about this mail.
            result = self._result(
                AttemptOutcome.TEMPORARY_FAILURE, str(error), reply_class=ReplyClass.ACCOUNT
            )
            self._ended(self, result)
        elif isinstance(error, GivenBackError) and self._refusal is not None and self._body_begun:
            # The server has seen the body and refused it: that was an attempt.
            self._ended(self, self._refusal)
        else:
            self._ended(self, error)

    def _refuse(self, session: KeptSession) -> SendResult | None:
        """Refuse a mail that exceeds what the server offers in EHLO, without asking the server.

        None means that the server may take the mail.
        """
        size, most = len(self._envelope.data), size_limit(session.extensions)
        if most is not None and size > most:
            code, text = (
                552,
                f"5.3.4 the mail has {size} bytes, but the server accepts at most {most} (SIZE)",
            )
        elif self._envelope.needs_smtputf8 and "smtputf8" not in session.extensions:
            code, text = 553, "5.6.7 the address needs SMTPUTF8, which the server does not offer"
        else:
            return None
        self._pool.keep(session)
        return self._result(
            AttemptOutcome.PERMANENT_FAILURE,
            text,
            code=code,
            enhanced_code=text.partition(" ")[0],
            reply_class=ReplyClass.CONTENT,
        )

    def _release(self, session: KeptSession, answer: Answer, result: SendResult) -> None:
        """Give a session back to the pool if it can carry another mail; otherwise end it."""
        if result.reply_class is ReplyClass.SENT:
            self._pool.accepted()
            self._pool.keep(session)
            return
        if result.reply_class is ReplyClass.CONNECTIONS:
            self._pool.too_many(session)
        if (
            session.ready
            and leaves_session_usable(answer.reply.code)
            and result.reply_class not in _ENDS_SESSION
            and not (session.in_body or session.needs_dot)
        ):
            session.reset()
            self._pool.keep(session)
        else:
            self._pool.end(session)

    def _broken(self, error: Exception) -> SendResult:
        one_too_many = (
            self._session is not None
            and not (self._body_begun or isinstance(error, TokenUnavailable))
            and self._lease.holds
            and self._pool.may_be_too_many(self._session)
        )
        # Without QUIT: the server still owes a reply, or does not speak SMTP.
        self._pool.drop(self._session)
        if one_too_many:
            return self._result(
                AttemptOutcome.TEMPORARY_FAILURE,
                f"{error}; other connections to the server work",
                reply_class=ReplyClass.CONNECTIONS,
            )
        in_doubt = self._transaction is not None and self._transaction.end_written
        return self._result(
            AttemptOutcome.IN_DOUBT if in_doubt else AttemptOutcome.CONNECTION_FAILURE,
            str(error) or type(error).__name__,
            mail_begun=self._session is not None and self._session.phase not in OPENING,
        )

    def _result_of(self, answer: Answer, earlier_mails: int) -> SendResult:
        phase, reply = answer
        enhanced, text = split_enhanced_code(reply.code, reply.text)
        meaning = self._rules.meaning(Reply(phase, reply.code, enhanced, text, earlier_mails))
        return self._result(
            outcome_of(meaning.reply_class, phase),
            reply.text,
            code=reply.code,
            enhanced_code=enhanced,
            reply_class=meaning.reply_class,
            daily=meaning.daily,
            mail_begun=phase not in OPENING,
        )

    def _result(
        self,
        outcome: AttemptOutcome,
        text: str,
        *,
        code: int | None = None,
        enhanced_code: str | None = None,
        reply_class: ReplyClass | None = None,
        daily: bool = False,
        mail_begun: bool = True,
    ) -> SendResult:
        return SendResult(
            outcome=outcome,
            body_begun=self._body_begun,
            started=self._started,
            ended=time.monotonic(),
            smtp_code=code,
            enhanced_code=enhanced_code,
            message=(self._session or self._endpoint).shown(text),
            reply_class=reply_class,
            daily=daily,
            mail_begun=mail_begun,
        )
