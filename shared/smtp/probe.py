"""Does the steps of a send up to RCPT and reports the result, without sending a mail."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from outbox_server.shared.egress import Egress
from outbox_server.shared.oauth2.credentials import (
    NO_TOKENS,
    TokenProvider,
    TokenRefused,
    TokenUnavailable,
)
from outbox_server.shared.smtp.commands import Command, mail_command, rcpt_command, size_limit
from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.smtp.limits import Deadline, FixedDeadline, PhaseLimits
from outbox_server.shared.smtp.replies import Phase, Reply, ReplyRules, split_enhanced_code
from outbox_server.shared.smtp.reply_parser import WireReply
from outbox_server.shared.smtp.session import (
    QUIT_LIMIT,
    SESSION_ERRORS,
    SessionRefused,
    SmtpSession,
)
from outbox_server.shared.states import ReplyClass
from outbox_server.shared.tls import TlsContexts

_STEPS: Final = {
    Phase.CONNECT: "connecting",
    Phase.STARTTLS: "encrypting (TLS)",
    Phase.EHLO: "greeting (EHLO)",
    Phase.AUTH: "signing in (AUTH)",
    Phase.MAIL: "naming the sender (MAIL)",
    Phase.RCPT: "naming a recipient (RCPT)",
}
# Getting a token is a part of AUTH, and comes before the connection.
_REQUESTING: Final = "requesting an access token"


@dataclass(frozen=True, slots=True)
class Probe:
    """How far a session got. `failure` is empty if the server accepted every step.

    `max_message_bytes` is None if the server states no limit. `failed_phase`, `smtp_code` and
    `reply_class` describe the step that failed; without a reply the last two are None. If an OAuth
    2.0 provider refused an access token, `reply_class` is ACCOUNT and `smtp_code` is None.
    """

    elapsed: timedelta
    helo: str = ""
    tls_version: str = ""
    extensions: tuple[str, ...] = ()
    max_message_bytes: int | None = None
    failure: str = ""
    failed_phase: Phase | None = None
    smtp_code: int | None = None
    reply_class: ReplyClass | None = None


class Prober:
    """Probes endpoints. A whole session may take `limit` seconds.

    `helo` is the name sent in EHLO; if it is empty, the session sends its own address.
    """

    def __init__(
        self,
        *,
        limits: PhaseLimits,
        limit: float,
        rules: ReplyRules,
        helo: str,
        egress: Egress,
        tls: TlsContexts,
        tokens: TokenProvider = NO_TOKENS,
    ) -> None:
        self._limits = limits
        self._limit = limit
        self._rules = rules
        self._helo = helo
        self._egress = egress
        self._tls = tls
        self._tokens = tokens

    async def probe(self, endpoint: Endpoint, mail_from: str, rcpt_to: str) -> Probe:
        """Open a session, send MAIL and RCPT as a send does, undo them, and end it by QUIT."""
        session = SmtpSession(
            endpoint,
            limits=self._limits,
            helo=self._helo,
            egress=self._egress,
            tls=self._tls,
            tokens=self._tokens,
        )
        started = time.monotonic()
        deadline = FixedDeadline(self._limit)
        refusal: WireReply | None = None
        failure = step = ""
        reply_class: ReplyClass | None = None
        # Kept here, because the session forgets it when the server closes the connection.
        tls_version = ""
        try:
            await session.open(deadline)
            tls_version = session.tls_version
            refusal = await self._announce(session, deadline, mail_from, rcpt_to)
            if refusal is None:
                await _reset(session)
        except SessionRefused as refused:
            refusal = refused.reply
        except TokenRefused as error:
            failure, step, reply_class = str(error), _REQUESTING, ReplyClass.ACCOUNT
        except TokenUnavailable as error:
            failure, step = str(error), _REQUESTING
        except TimeoutError as error:
            failure = str(error) or f"the session took longer than {self._limit:g} s"
        except SESSION_ERRORS as error:
            failure = str(error) or type(error).__name__
        finally:
            elapsed = timedelta(seconds=time.monotonic() - started)
            tls_version = tls_version or session.tls_version
            await session.quit()
        if refusal is not None:
            failure, reply_class = str(refusal), self._class_of(session.phase, refusal)
        failed = bool(failure)
        return Probe(
            elapsed,
            helo=session.helo,
            tls_version=tls_version,
            extensions=tuple(sorted(name.upper() for name in session.extensions)),
            max_message_bytes=size_limit(session.extensions),
            failure=session.shown(f"{step or _STEPS[session.phase]}: {failure}") if failed else "",
            failed_phase=session.phase if failed else None,
            smtp_code=None if refusal is None else refusal.code,
            reply_class=reply_class,
        )

    async def _announce(
        self, session: SmtpSession, deadline: Deadline, mail_from: str, rcpt_to: str
    ) -> WireReply | None:
        """Send MAIL and RCPT, and return the first refusal; None if both were accepted."""
        smtputf8 = not (mail_from.isascii() and rcpt_to.isascii())
        session.phase = Phase.MAIL
        if smtputf8 and "smtputf8" not in session.extensions:
            raise OSError("the address needs SMTPUTF8, which the server does not offer")
        mail = mail_command(mail_from, session.extensions, size=None, smtputf8=smtputf8)
        answers = await session.exchange(
            [
                Command(Phase.MAIL, mail, self._limits.mail),
                Command(Phase.RCPT, rcpt_command(rcpt_to), self._limits.rcpt),
            ],
            deadline,
        )
        for answer in answers:
            if not answer.accepted:
                session.phase = answer.phase
                return answer.reply
        return None

    def _class_of(self, phase: Phase, refusal: WireReply) -> ReplyClass:
        enhanced, text = split_enhanced_code(refusal.code, refusal.text)
        return self._rules.meaning(Reply(phase, refusal.code, enhanced, text)).reply_class


async def _reset(session: SmtpSession) -> None:
    """Undo MAIL and RCPT with RSET. An error is ignored, because QUIT undoes them too."""
    with suppress(*SESSION_ERRORS):
        session.stream.write(b"RSET\r\n")
        await session.stream.reply(QUIT_LIMIT, FixedDeadline(QUIT_LIMIT))
