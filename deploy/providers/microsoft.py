"""Mailboxes of Exchange Online."""

from __future__ import annotations

from dataclasses import replace
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

# https://learn.microsoft.com/exchange/troubleshoot/send-emails/smtp-submission-improvements:
# three connections that submit at once, 30 mails per minute, 10,000 recipients per day, and
# the text of the daily refusal. Clients report the text of 432, after the body:
# https://github.com/timeoff-management/timeoff-management-application/issues/308.
# Whether mail above 30 per minute is delayed or refused is documented both ways; 421 4.4.2 is
# Exchange's refusal.
EXCHANGE_ONLINE: Final = Profile(
    name="exchange-online",
    title="a mailbox of Exchange Online (smtp.office365.com)",
    host="outlook.office365.com",
    greeting="outlook.office365.com Microsoft ESMTP MAIL Service ready",
    accepted="2.0.0 OK <{id}@outlook.office365.com> [Hostname=outlook.office365.com]",
    extensions=("PIPELINING", "DSN", "ENHANCEDSTATUSCODES", "8BITMIME", "SMTPUTF8"),
    mechanisms=("LOGIN", "XOAUTH2"),
    size=157_286_400,
    connections=Cap(
        3,
        RefusingReply(
            Phase.BODY, 432, "4.3.2",
            "STOREDRV.ClientSubmit; sender thread limit exceeded [Hostname={id}.prod.outlook.com]",
        ),
    ),
    rates=(
        Rate(
            30, MINUTE_S,
            RefusingReply(
                Phase.MAIL, 421, "4.4.2",
                "Message submission rate for this client has exceeded the configured limit",
                closes=True,
            ),
        ),
        Rate(
            10_000, DAY_S,
            RefusingReply(
                Phase.BODY, 554, "5.2.0",
                "STOREDRV.Submission.Exception:SubmissionQuotaExceededException; Failed to "
                "process message due to a permanent exception with message Cannot submit "
                "message. [Hostname={id}.prod.outlook.com]",
            ),
        ),
    ),
    unknown_recipient=RefusingReply(
        Phase.RCPT, 550, "5.1.10",
        "RESOLVER.ADR.RecipientNotFound; Recipient {recipient} not found by SMTP address lookup",
        for_good=True,
    ),
    wrong_password=RefusingReply(
        Phase.AUTH, 535, "5.7.3", "Authentication unsuccessful [{id}.prod.outlook.com]"
    ),
    auth_required=RefusingReply(
        Phase.MAIL, 530, "5.7.57",
        "Client not authenticated to send mail. [{id}.prod.outlook.com]",
    ),
    idle=RefusingReply(
        Phase.MAIL, 451, "4.7.0", "Timeout waiting for client input [{id}.prod.outlook.com]",
        closes=True,
    ),
)  # fmt: skip

# The same mailbox after Microsoft has blocked it from sending:
# https://learn.microsoft.com/exchange/mail-flow-best-practices/non-delivery-reports-in-exchange-online
# has 5.1.90 (daily recipient limit) in its list of codes.
EXCHANGE_BLOCKED: Final = replace(
    EXCHANGE_ONLINE,
    name="exchange-blocked",
    title="a mailbox of Exchange Online that has used its recipients of the day",
    always=(
        RefusingReply(
            Phase.MAIL, 550, "5.1.90",
            "Your message can't be sent because you've reached your daily limit for message "
            "recipients",
        ),
    ),
)  # fmt: skip
