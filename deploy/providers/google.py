"""Gmail and the SMTP relay of Google Workspace."""

from __future__ import annotations

from typing import Final

from outbox_server.deploy.providers.profile import (
    DAY_S,
    MINUTE_S,
    Cap,
    Profile,
    Rate,
    RefusingReply,
)
from outbox_server.shared.smtp.replies import Phase

# Gmail and Google Workspace. Texts: https://support.google.com/a/answer/3726730 (Gmail SMTP errors
# and codes). Limits: https://support.google.com/a/answer/166852 (500 mails per day for a personal
# account, 2,000 for Workspace). Senders report the daily refusal as smtplib.SMTPDataError, so it
# comes after the body. The limits per minute and of connections are not published: guesses.
_GOOGLE_UNKNOWN: Final = RefusingReply(
    Phase.RCPT, 550, "5.1.1",
    "The email account that you tried to reach does not exist. Please try\n"
    "double-checking the recipient's email address for typos or\n"
    "unnecessary spaces. For more information, go to\n"
    " https://support.google.com/mail/?p=NoSuchUser {id} - gsmtp",
    for_good=True,
)  # fmt: skip
_GOOGLE_FULL: Final = RefusingReply(
    Phase.RCPT, 452, "4.2.2",
    "The recipient's inbox is out of storage space. Please direct the\nrecipient to\n"
    " https://support.google.com/mail/?p=OverQuotaTemp {id} - gsmtp",
)  # fmt: skip
_GOOGLE_CONTENT: Final = RefusingReply(
    Phase.BODY, 552, "5.7.0",
    "This message was blocked because its content presents a potential\n"
    "security issue. Please visit\n"
    " https://support.google.com/mail/?p=BlockedMessage to review our message\n"
    "content and attachment content guidelines. {id} - gsmtp",
    for_good=True,
)  # fmt: skip
_GOOGLE_TOO_OFTEN: Final = RefusingReply(
    Phase.EHLO, 421, "4.7.0",
    "Try again later, closing connection. (EHLO)\nFor more information, go to\n"
    " https://support.google.com/a/answer/3221692 {id} - gsmtp",
    closes=True,
)  # fmt: skip
_GOOGLE_RATE: Final = RefusingReply(
    Phase.MAIL, 421, "4.7.28",
    "Our system has detected an unusual rate of unsolicited mail originating\n"
    "from your IP address. To protect our users from spam, mail sent from your\n"
    "IP address has been temporarily rate limited. {id} - gsmtp",
    closes=True,
)  # fmt: skip
_GOOGLE_IDLE: Final = RefusingReply(
    Phase.MAIL, 451, "4.4.2", "Timeout - closing connection. {id} - gsmtp", closes=True
)

GMAIL: Final = Profile(
    name="gmail",
    title="a Gmail account (smtp.gmail.com)",
    host="smtp.gmail.com",
    greeting="smtp.gmail.com ESMTP {id} - gsmtp",
    accepted="2.0.0 OK {id} - gsmtp",
    # Gmail offers CHUNKING too; this server has no BDAT.
    mechanisms=("LOGIN", "PLAIN", "XOAUTH2", "OAUTHBEARER"),
    size=35_882_577,
    connections=Cap(10, _GOOGLE_TOO_OFTEN),
    rates=(
        Rate(100, MINUTE_S, _GOOGLE_RATE),
        Rate(
            500, DAY_S,
            RefusingReply(
                Phase.BODY, 550, "5.4.5",
                "Daily user sending limit exceeded. For more information on Gmail\n"
                "sending limits go to\n"
                " https://support.google.com/a/answer/166852 {id} - gsmtp",
            ),
        ),
    ),
    unknown_recipient=_GOOGLE_UNKNOWN,
    full_mailbox=_GOOGLE_FULL,
    refused_content=_GOOGLE_CONTENT,
    wrong_password=RefusingReply(
        Phase.AUTH, 535, "5.7.8",
        "Username and Password not accepted. For more information, go to\n"
        " https://support.google.com/mail/?p=BadCredentials {id} - gsmtp",
    ),
    auth_required=RefusingReply(
        Phase.MAIL, 530, "5.7.0",
        "Authentication Required. For more information, go to\n"
        " https://support.google.com/accounts/troubleshooter/2402620. {id} - gsmtp",
    ),
    tls_required=RefusingReply(
        Phase.MAIL, 530, "5.7.0", "Must issue a STARTTLS command first. {id} - gsmtp"
    ),
    idle=_GOOGLE_IDLE,
)  # fmt: skip

# https://support.google.com/a/answer/2956491 (SMTP relay service): 10,000 mails per user and day,
# counted by the envelope sender, 100 recipients per transaction; it knows its customers by
# their address. An EHLO such as `localhost` is refused: https://support.google.com/a/answer/6140680
# and many reports of "421 4.7.0 Try again later, closing connection. (EHLO)".
# The peak limit is not published: a guess.
WORKSPACE_RELAY: Final = Profile(
    name="workspace-relay",
    title="the SMTP relay of Google Workspace (smtp-relay.gmail.com)",
    host="smtp-relay.gmail.com",
    greeting="smtp-relay.gmail.com ESMTP {id} - gsmtp",
    accepted="2.0.0 OK {id} - gsmtp",
    size=35_882_577,
    requires_auth=False,
    bad_helo=_GOOGLE_TOO_OFTEN,
    connections=Cap(20, _GOOGLE_TOO_OFTEN),
    rates=(
        Rate(
            600, MINUTE_S,
            RefusingReply(
                Phase.MAIL, 450, "4.2.1",
                "Peak SMTP relay limit exceeded for customer. This is a\n"
                "temporary error. For more information on SMTP relay limits, please\n"
                "contact your administrator. {id} - gsmtp",
            ),
        ),
        Rate(
            10_000, DAY_S,
            RefusingReply(
                Phase.BODY, 550, "5.4.5",
                "Daily SMTP relay limit exceeded for user. For more\n"
                "information on SMTP relay sending limits please contact your\n"
                "administrator. {id} - gsmtp",
            ),
        ),
    ),
    unknown_recipient=_GOOGLE_UNKNOWN,
    full_mailbox=_GOOGLE_FULL,
    refused_content=_GOOGLE_CONTENT,
    tls_required=GMAIL.tls_required,
    idle=_GOOGLE_IDLE,
)  # fmt: skip
