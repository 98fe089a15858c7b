"""The providers that can be simulated, with their limits and the texts of their replies.

Limits that a provider does not publish are guesses, and comments say so. Some relays accept mail
for unknown or full mailboxes and send a bounce later. A simulated provider cannot send a bounce, so
it refuses such mail at once, with the text that the provider's incoming servers use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from outbox_server.deploy.providers.google import GMAIL, WORKSPACE_RELAY
from outbox_server.deploy.providers.microsoft import EXCHANGE_BLOCKED, EXCHANGE_ONLINE
from outbox_server.deploy.providers.profile import (
    DAY_S,
    HOUR_S,
    Cap,
    Greylist,
    Profile,
    Rate,
    RefusingReply,
)
from outbox_server.shared.smtp.replies import Phase

PLAIN: Final = Profile(
    name="plain",
    title="a mail server without limits",
    requires_tls=False,
    requires_auth=False,
)

# https://docs.aws.amazon.com/ses/latest/dg/manage-sending-quotas-errors.html (454) and
# https://docs.aws.amazon.com/ses/latest/dg/troubleshoot-smtp.html (the other texts). A new
# account (the sandbox) may send 1 mail per second and 200 per day.
SES: Final = Profile(
    name="ses",
    title="Amazon SES, an account in the sandbox (email-smtp.*.amazonaws.com)",
    host="email-smtp.amazonaws.com",
    greeting="email-smtp.amazonaws.com ESMTP SimpleEmailService-d-{id}",
    accepted="Ok {id}",
    extensions=("8BITMIME", "PIPELINING"),
    size=41_943_040,
    connections=Cap(
        20,
        RefusingReply(
            Phase.CONNECT, 421, "", "Too many concurrent SMTP connections", closes=True
        ),
    ),
    rates=(
        Rate(
            1, 1.0,
            RefusingReply(
                Phase.BODY, 454, "", "Throttling failure: Maximum sending rate exceeded."
            ),
        ),
        Rate(
            200, DAY_S,
            RefusingReply(Phase.BODY, 454, "", "Throttling failure: Daily message quota exceeded."),
        ),
    ),
    refused_content=RefusingReply(
        Phase.BODY, 554, "", "Transaction failed: Illegal content", for_good=True
    ),
    wrong_password=RefusingReply(Phase.AUTH, 535, "", "Authentication Credentials Invalid"),
    auth_required=RefusingReply(Phase.MAIL, 530, "", "Authentication required"),
    tls_required=RefusingReply(Phase.MAIL, 530, "", "Must issue a STARTTLS command first"),
    idle=RefusingReply(Phase.MAIL, 451, "", "Timeout waiting for data from client.", closes=True),
)  # fmt: skip

# Exim's src/smtp_in.c has "421 too many messages in this connection" (for
# smtp_accept_max_per_connection) and "421 Too many concurrent SMTP connections; please try again
# later." The hourly text is cPanel's: https://forums.cpanel.net/threads/email-quota.697029/.
# Hosting companies choose the numbers themselves.
SHARED_HOST: Final = Profile(
    name="shared-host",
    title="a shared host with cPanel and Exim",
    host="server.shared-host.example",
    greeting="server.shared-host.example ESMTP Exim 4.98",
    accepted="OK id={id}",
    extensions=("PIPELINING", "8BITMIME"),
    size=52_428_800,
    connections=Cap(
        5,
        RefusingReply(
            Phase.CONNECT, 421, "",
            "Too many concurrent SMTP connections; please try again later.",
            closes=True,
        ),
    ),
    mails_per_connection=Cap(
        5, RefusingReply(Phase.MAIL, 421, "", "too many messages in this connection", closes=True)
    ),
    rates=(
        Rate(
            200, HOUR_S,
            RefusingReply(
                Phase.RCPT, 550, "",
                "Domain {sender_domain} has exceeded the max emails per hour "
                "({used}/{most} (100%)) allowed.  Message discarded.",
            ),
        ),
    ),
    unknown_recipient=RefusingReply(Phase.RCPT, 550, "", "No Such User Here", for_good=True),
    wrong_password=RefusingReply(Phase.AUTH, 535, "", "Incorrect authentication data"),
    idle=RefusingReply(
        Phase.MAIL, 421, "", "server.shared-host.example: SMTP command timeout - closing "
        "connection", closes=True,
    ),
)  # fmt: skip

# https://www.ionos.com/help/email/general-topics/what-are-the-mass-mailing-limits (the text with
# 450, and the mails per hour). "451 Mails per session limit exceeded" as senders report it, for
# example on the list qemu-devel on 10 March 2021; the number of mails differs by contract.
IONOS: Final = Profile(
    name="ionos",
    title="a mailbox of IONOS (smtp.ionos.com)",
    host="smtp.ionos.example",
    greeting="kundenserver.de (mreue) Nemesis ESMTP Service ready",
    accepted="Requested mail action okay, completed: id={id}",
    extensions=("8BITMIME",),
    size=157_286_400,
    mails_per_connection=Cap(
        5,
        RefusingReply(
            Phase.BODY, 451, "", "Requested action aborted\nMails per session limit exceeded."
        ),
    ),
    rates=(
        Rate(
            50, HOUR_S,
            RefusingReply(
                Phase.BODY, 450, "",
                "Requested mail action not taken: mailbox unavailable\n"
                "Mail send limit exceeded.",
            ),
        ),
    ),
    wrong_password=RefusingReply(Phase.AUTH, 535, "", "Authentication credentials invalid"),
)  # fmt: skip

# Postfix' "Recipient address rejected" with postgrey's default --greylist-text and its default
# --delay of 300 s: https://postgrey.schweikert.ch/, https://manpages.debian.org/postgrey.
POSTGREY: Final = Profile(
    name="postgrey",
    title="Postfix with postgrey",
    greeting="mail.example.com ESMTP Postfix",
    requires_tls=False,
    requires_auth=False,
    greylist=Greylist(
        300.0,
        RefusingReply(
            Phase.RCPT, 450, "4.2.0",
            "<{recipient}>: Recipient address rejected: Greylisted, see "
            "http://postgrey.schweikert.ch/help/{domain}.html",
        ),
    ),
)  # fmt: skip

# RFC 5321, 4.5.3.2.6 gives the reply to the final dot ten minutes; a scanner in the mail flow,
# such as Postfix' smtpd_proxy_filter in front of amavis, needs seconds to minutes of them.
SLOW_SCANNER: Final = Profile(
    name="slow-scanner",
    title="a server that scans each mail for 25 s before it replies",
    requires_tls=False,
    requires_auth=False,
    reply_delay_s=25.0,
)

# https://www.postfix.org/postconf.5.html#reject_non_fqdn_helo_hostname; it is said at RCPT,
# because of smtpd_delay_reject. Text: Postfix' src/smtpd/smtpd_check.c.
STRICT_POSTFIX: Final = Profile(
    name="strict-postfix",
    title="Postfix with reject_non_fqdn_helo_hostname",
    greeting="mail.example.com ESMTP Postfix",
    requires_tls=False,
    requires_auth=False,
    bad_helo=RefusingReply(
        Phase.RCPT, 504, "5.5.2",
        "<{helo}>: Helo command rejected: need fully-qualified hostname",
    ),
)  # fmt: skip

PROFILES: Final[Mapping[str, Profile]] = {
    profile.name: profile
    for profile in (
        GMAIL,
        WORKSPACE_RELAY,
        EXCHANGE_ONLINE,
        EXCHANGE_BLOCKED,
        SES,
        SHARED_HOST,
        IONOS,
        POSTGREY,
        SLOW_SCANNER,
        STRICT_POSTFIX,
        PLAIN,
    )
}
