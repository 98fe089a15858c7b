"""The profile of a simulated provider: its limits, and its replies beyond them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final, Self

from outbox_server.shared.smtp.replies import Phase

DAY_S: Final = 86_400.0
HOUR_S: Final = 3_600.0
MINUTE_S: Final = 60.0

# Every provider refuses recipients that begin with these words, so that a test or a demonstration
# can cause the refusal.
UNKNOWN_PREFIX: Final = "unknown"
FULL_PREFIX: Final = "full"
# A mail that contains this text anywhere is refused because of its content.
CONTENT_MARKER: Final = b"refuse-this-content"


@dataclass(frozen=True, slots=True)
class RefusingReply:
    """One refusing reply and the step of the session in which the provider gives it.

    `text` may have several lines, and these fields in braces: `{id}` (unique), `{recipient}`,
    `{domain}` (the recipient's), `{sender_domain}`, `{helo}`, `{most}` and `{used}` (of the limit
    that is exceeded).
    """

    phase: Phase
    code: int
    enhanced: str
    text: str
    # The provider closes the connection after the reply.
    closes: bool = False
    # The mail will never be accepted, however often it is tried.
    for_good: bool = False


@dataclass(frozen=True, slots=True)
class Cap:
    """A limit, and the reply to what exceeds it."""

    most: int
    refusal: RefusingReply


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `most` mails of one account in any `seconds`."""

    most: int
    seconds: float
    refusal: RefusingReply


@dataclass(frozen=True, slots=True)
class Greylist:
    """A triplet (client, sender, recipient) is refused until it is `delay_s` old."""

    delay_s: float
    refusal: RefusingReply


UNKNOWN: Final = RefusingReply(
    Phase.RCPT, 550, "5.1.1", "<{recipient}>: Recipient address rejected: User unknown",
    for_good=True,
)  # fmt: skip
FULL: Final = RefusingReply(Phase.RCPT, 452, "4.2.2", "<{recipient}>: the mailbox is full")
CONTENT: Final = RefusingReply(
    Phase.BODY, 554, "5.7.1", "Message rejected because of its content", for_good=True
)
WRONG_PASSWORD: Final = RefusingReply(Phase.AUTH, 535, "5.7.8", "Error: authentication failed")
AUTH_REQUIRED: Final = RefusingReply(Phase.MAIL, 530, "5.7.0", "Authentication required")
TLS_REQUIRED: Final = RefusingReply(Phase.MAIL, 530, "5.7.0", "Must issue a STARTTLS command first")
IDLE: Final = RefusingReply(Phase.MAIL, 421, "4.4.2", "Timeout, closing connection", closes=True)


@dataclass(frozen=True, slots=True)
class Profile:
    """A provider. All times are seconds; None means that there is no such limit."""

    name: str
    title: str
    greeting: str = "mail.example.com ESMTP"
    host: str = "mail.example.com"
    accepted: str = "2.0.0 Ok: queued as {id}"
    # What EHLO offers. STARTTLS, AUTH and SIZE are added by the server.
    extensions: tuple[str, ...] = ("PIPELINING", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES")
    mechanisms: tuple[str, ...] = ("PLAIN", "LOGIN")
    size: int = 25 * 1024 * 1024
    requires_tls: bool = True
    requires_auth: bool = True
    recipients_per_mail: int = 100
    mails_per_connection: Cap | None = None
    # Open connections of one account; before AUTH, of one address.
    connections: Cap | None = None
    rates: tuple[Rate, ...] = ()
    greylist: Greylist | None = None
    # The reply to a name in EHLO that is neither fully qualified nor an address literal.
    bad_helo: RefusingReply | None = None
    # Replies that are always given, for example to a blocked account.
    always: tuple[RefusingReply, ...] = ()
    unknown_recipient: RefusingReply = UNKNOWN
    full_mailbox: RefusingReply = FULL
    refused_content: RefusingReply = CONTENT
    wrong_password: RefusingReply = WRONG_PASSWORD
    auth_required: RefusingReply = AUTH_REQUIRED
    tls_required: RefusingReply = TLS_REQUIRED
    idle: RefusingReply = IDLE
    greeting_delay_s: float = 0.0
    # The time between the final dot and its reply. The mail counts as accepted before it.
    reply_delay_s: float = 0.0
    # A full mailbox has room again this long after its first refusal.
    full_for_s: float = HOUR_S
    idle_s: float = 300.0
    # Empty lines before the reply to the final dot.
    blank_lines: int = 0
    # Answers DATA with 354 although every recipient was refused, as RFC 2920 allows.
    data_without_recipients: bool = False

    def scaled(self, scale: float) -> Self:
        """Return the same provider with every time multiplied by `scale`."""
        return dataclasses.replace(
            self,
            rates=tuple(
                dataclasses.replace(rate, seconds=rate.seconds * scale) for rate in self.rates
            ),
            greylist=self.greylist
            and dataclasses.replace(self.greylist, delay_s=self.greylist.delay_s * scale),
            greeting_delay_s=self.greeting_delay_s * scale,
            reply_delay_s=self.reply_delay_s * scale,
            full_for_s=self.full_for_s * scale,
        )

    def with_quota(self, most: int) -> Self:
        """Return the same provider with another number of mails in its longest period.

        A shorter period allows no more than that either.
        """
        longest = max((rate.seconds for rate in self.rates), default=0.0)
        return dataclasses.replace(
            self,
            rates=tuple(
                dataclasses.replace(
                    rate, most=most if rate.seconds == longest else min(rate.most, most)
                )
                for rate in self.rates
            ),
        )


def is_qualified(helo: str) -> bool:
    """Return whether a name in EHLO is fully qualified, or is an address literal."""
    if helo.startswith("[") and helo.endswith("]"):
        return True
    labels = helo.rstrip(".").split(".")
    return len(labels) > 1 and all(labels)
