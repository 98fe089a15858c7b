"""The envelope of a mail to send, and the result of an attempt to send it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from outbox_server.shared.smtp.replies import Phase
from outbox_server.shared.states import AttemptOutcome, ReplyClass

_OUTCOMES: Final = {
    ReplyClass.SENT: AttemptOutcome.SENT,
    # A new connection was refused in the same way.
    ReplyClass.SESSION: AttemptOutcome.CONNECTION_FAILURE,
    ReplyClass.ACCOUNT: AttemptOutcome.TEMPORARY_FAILURE,
    ReplyClass.CONNECTIONS: AttemptOutcome.TEMPORARY_FAILURE,
    ReplyClass.RATE: AttemptOutcome.TEMPORARY_FAILURE,
    ReplyClass.DEFERRED: AttemptOutcome.TEMPORARY_FAILURE,
    ReplyClass.TEMPORARY: AttemptOutcome.TEMPORARY_FAILURE,
    ReplyClass.AUTH: AttemptOutcome.CONNECTION_FAILURE,
    ReplyClass.RECIPIENT: AttemptOutcome.PERMANENT_FAILURE,
    ReplyClass.CONTENT: AttemptOutcome.PERMANENT_FAILURE,
    ReplyClass.REFUSED: AttemptOutcome.PERMANENT_FAILURE,
}
# The phases before MAIL, in which the server does not know of the mail.
OPENING: Final = frozenset({Phase.CONNECT, Phase.EHLO, Phase.STARTTLS, Phase.AUTH})
# Refusals before MAIL that are about how much is sent, not about the endpoint's health.
_ALLOWANCES: Final = frozenset({ReplyClass.CONNECTIONS, ReplyClass.RATE, ReplyClass.ACCOUNT})


@dataclass(frozen=True, slots=True)
class Envelope:
    """One mail with its SMTP addresses. `data` ends with CRLF; its leading dots are not doubled."""

    mail_from: str
    rcpt_to: str
    data: bytes
    needs_smtputf8: bool


@dataclass(frozen=True, slots=True)
class SendResult:
    """How an attempt ended. Times are values of `time.monotonic`.

    `reply_class` is the meaning of the last reply; None means that there was none. Without a code
    it is ACCOUNT where an OAuth 2.0 provider refused an access token, and CONNECTIONS where a new
    connection failed while others worked. `daily` means that the reply names a daily quota.
    """

    outcome: AttemptOutcome
    # The body was begun, so the attempt counts in the sender's window.
    body_begun: bool
    started: float
    ended: float
    smtp_code: int | None = None
    enhanced_code: str | None = None
    message: str | None = None
    reply_class: ReplyClass | None = None
    daily: bool = False
    # Whether MAIL was sent for this mail.
    mail_begun: bool = True


class GivenBackError(Exception):
    """The send did not begin, because the dispatcher drains or the lease ended."""


def outcome_of(reply_class: ReplyClass, phase: Phase) -> AttemptOutcome:
    """Return the outcome of an attempt whose last reply has this class and came in this phase."""
    if phase in OPENING and reply_class not in _ALLOWANCES:
        return AttemptOutcome.CONNECTION_FAILURE
    return _OUTCOMES[reply_class]
