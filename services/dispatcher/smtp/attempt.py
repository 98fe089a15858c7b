"""One attempt to send a mail: over a kept connection and, if that one fails, over a new one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from outbox_server.services.dispatcher.smtp.endpoint_pool import EndpointPool
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
from outbox_server.shared.smtp.reply_parser import WireReply
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


class SendAttempt:
    """Sends one mail. The outcome depends on the replies and on how much of the mail was sent."""

    def __init__(
        self,
        endpoint: Endpoint,
        pool: EndpointPool,
        new_session: Callable[[], KeptSession],
        *,
        limits: PhaseLimits,
        rules: ReplyRules,
        lease: Lease,
        may_begin: Callable[[], bool],
    ) -> None:
        self._endpoint = endpoint
        self._pool = pool
        self._new_session = new_session
        self._limits = limits
        self._rules = rules
        self._lease = lease
        self._may_begin = may_begin
        self._started = 0.0
        self._body_begun = False
        # The connection in use. None means that the attempt only has a place for a connection.
        self._session: KeptSession | None = None
        self._transaction: Transaction | None = None
        # Mails that the kept connection carried before its server refused another one.
        self._carried: int | None = None
        # The refusal on the kept connection, after which the mail is tried on a new connection.
        self._refusal: SendResult | None = None

    async def run(self, envelope: Envelope) -> SendResult:
        """Return how the attempt ended.

        Raises:
            GivenBackError: the send may not begin, and the server has no part of the body.
        """
        self._check()
        self._session = await self._pool.acquire(self._lease, self._may_begin)
        self._lease.begun = True
        self._started = time.monotonic()
        try:
            result = None
            if self._session is not None:
                result = await self._over_kept(self._session, envelope)
            return result or await self._over_new(envelope)
        except SESSION_ERRORS as error:
            return self._broken(error)
        except TokenRefused as error:
            # The account was refused. The server was not asked about this mail.
            self._pool.drop(self._session)
            return self._result(
                AttemptOutcome.TEMPORARY_FAILURE, str(error), reply_class=ReplyClass.ACCOUNT
            )
        except GivenBackError:
            self._pool.drop(self._session)
            if self._refusal is not None and self._body_begun:
                # The server has seen the body and refused it: that was an attempt.
                return self._refusal
            raise
        except BaseException:
            self._pool.drop(self._session)
            raise

    def _check(self) -> None:
        if not (self._may_begin() and self._lease.holds):
            raise GivenBackError

    async def _over_kept(self, session: KeptSession, envelope: Envelope) -> SendResult | None:
        """Send over a kept connection and return the result.

        None means that only the connection failed. It is closed, and the attempt keeps its place.
        """
        refusal = self._refuse(session, envelope)
        if refusal is not None:
            return refusal
        idled, carried = self._pool.was_idling(session), session.mails
        try:
            answer = await self._hand_over(session, envelope)
        except SESSION_ERRORS:
            if self._body_begun or not self._lease.holds:
                raise
            # The server closed the connection while it was idle, or has forgotten it. That says
            # nothing about the server or the mail. Without QUIT: the server may still owe a reply.
            session.abort()
        else:
            result = self._result_of(answer.phase, answer.reply, carried)
            if result.reply_class is not ReplyClass.SESSION:
                self._release(session, answer, result)
                return result
            self._carried = None if idled else carried
            self._refusal = result
        await self._pool.replace(session)
        self._session = None
        return None

    async def _over_new(self, envelope: Envelope) -> SendResult:
        self._check()
        session = self._session = self._new_session()
        self._transaction = None
        try:
            await session.open(self._lease)
        except SessionRefused as refused:
            answer = Answer(refused.phase, refused.reply)
        else:
            self._pool.opened(session)
            refusal = self._refuse(session, envelope)
            if refusal is not None:
                return refusal
            answer = await self._hand_over(session, envelope)
        result = self._result_of(answer.phase, answer.reply, 0)
        if result.reply_class in _POSSIBLY_TOO_MANY and answer.phase in _BEFORE_RCPT:
            self._pool.may_be_too_many(session)
        if result.reply_class is ReplyClass.SENT and self._carried:
            self._pool.learn_mails(self._carried)
        self._release(session, answer, result)
        return result

    async def _hand_over(self, session: KeptSession, envelope: Envelope) -> Answer:
        if not self._pool.trusts_pipelining:
            session.extensions.pop("pipelining", None)
        transaction = Transaction(session, self._limits, self._lease, self._may_begin)
        self._transaction = transaction
        used = session.mails > 0
        try:
            return await transaction.run(envelope)
        except SESSION_ERRORS as error:
            # A kept connection may be closed because it was idle, whatever pipelining does.
            idled = used and isinstance(error, ConnectionLost)
            if not (transaction.body_begun or idled) and self._lease.holds:
                self._pool.distrust_pipelining()
            raise
        finally:
            self._body_begun |= transaction.body_begun

    # How a mail ends -------------------------------------------------------------------------

    def _refuse(self, session: KeptSession, envelope: Envelope) -> SendResult | None:
        """Refuse a mail that exceeds what the server offers in EHLO, without asking the server.

        None means that the server may take the mail.
        """
        size, most = len(envelope.data), size_limit(session.extensions)
        if most is not None and size > most:
            code, text = (
                552,
                f"5.3.4 the mail has {size} bytes, but the server accepts at most {most} (SIZE)",
            )
        elif envelope.needs_smtputf8 and "smtputf8" not in session.extensions:
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

    def _result_of(self, phase: Phase, reply: WireReply, earlier_mails: int) -> SendResult:
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
