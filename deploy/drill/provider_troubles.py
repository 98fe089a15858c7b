"""Limits of mail providers as faults of a drill, with the providers' own replies.

Each is a profile with a single limit, so low that it is reached within seconds. No mail may end as
FAILED because of it, except by a reply that refuses the mail permanently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from outbox_server.deploy.drill.plan import SLOW_REPLY_S
from outbox_server.deploy.providers.catalog import (
    IONOS,
    PLAIN,
    POSTGREY,
    SES,
    SHARED_HOST,
    STRICT_POSTFIX,
)
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

# Few, because the day or the hour does not end within a fault.
_MAILS_PER_DAY: Final = 5
_MAILS_PER_SECOND: Final = 2
_MAILS_PER_CONNECTION: Final = 2
_CONNECTIONS: Final = 2
_GREYLIST_S: Final = 1.5
_BASE: Final = dataclasses.replace(PLAIN, name="drill", title="a habit of a provider")


def _daily(provider: Profile) -> Profile:
    reply = provider.rates[-1].refusal
    return dataclasses.replace(_BASE, rates=(Rate(_MAILS_PER_DAY, DAY_S, reply),))


def _hourly(provider: Profile) -> Profile:
    reply = provider.rates[-1].refusal
    return dataclasses.replace(_BASE, rates=(Rate(_MAILS_PER_DAY, HOUR_S, reply),))


def _rate(provider: Profile) -> Profile:
    reply = provider.rates[0].refusal
    return dataclasses.replace(_BASE, rates=(Rate(_MAILS_PER_SECOND, 1.0, reply),))


def _session(reply: RefusingReply) -> Profile:
    return dataclasses.replace(_BASE, mails_per_connection=Cap(_MAILS_PER_CONNECTION, reply))


def _session_of(provider: Profile) -> Profile:
    cap = provider.mails_per_connection
    if cap is None:
        raise ValueError(f"{provider.name} has no limit per connection")
    return _session(cap.refusal)


def _connections(provider: Profile) -> Profile:
    cap = provider.connections
    if cap is None:
        raise ValueError(f"{provider.name} has no limit of connections")
    return dataclasses.replace(_BASE, connections=Cap(_CONNECTIONS, cap.refusal))


def _greylist(reply: RefusingReply) -> Profile:
    return dataclasses.replace(_BASE, greylist=Greylist(_GREYLIST_S, reply))


def _greylist_of(provider: Profile) -> Profile:
    if provider.greylist is None:
        raise ValueError(f"{provider.name} does not greylist")
    return _greylist(provider.greylist.refusal)


def _always(
    phase: Phase, code: int, enhanced: str, text: str, *, for_good: bool = False
) -> Profile:
    reply = RefusingReply(phase, code, enhanced, text, for_good=for_good)
    return dataclasses.replace(_BASE, always=(reply,))


# The keys are the fault and its variant.
PROVIDER_TROUBLES: Final[Mapping[tuple[str, str], Profile]] = {
    ("smtp_daily_quota", "gmail"): _daily(GMAIL),
    ("smtp_daily_quota", "exchange"): _daily(EXCHANGE_ONLINE),
    ("smtp_daily_quota", "ses"): _daily(SES),
    ("smtp_daily_quota", "workspace"): _daily(WORKSPACE_RELAY),
    ("smtp_hourly_quota", "cpanel"): _hourly(SHARED_HOST),
    ("smtp_hourly_quota", "ionos"): _hourly(IONOS),
    ("smtp_mails_per_connection", "421"): _session_of(SHARED_HOST),
    ("smtp_mails_per_connection", "451"): _session_of(IONOS),
    # KumoMTA's max_messages_per_connection: a transient failure at MAIL, and no close.
    ("smtp_mails_per_connection", "452"): _session(
        RefusingReply(Phase.MAIL, 452, "4.3.2", "Too many messages sent on this connection")
    ),
    # A server that has forgotten the session.
    ("smtp_mails_per_connection", "503"): _session(
        RefusingReply(Phase.MAIL, 503, "5.5.1", "Error: send HELO/EHLO first")
    ),
    ("smtp_too_many_connections", "exim"): _connections(SHARED_HOST),
    ("smtp_too_many_connections", "exchange"): _connections(EXCHANGE_ONLINE),
    ("smtp_rate", "gmail"): _rate(GMAIL),
    ("smtp_rate", "exchange"): _rate(EXCHANGE_ONLINE),
    ("smtp_rate", "ses"): _rate(SES),
    ("smtp_rate", "workspace"): _rate(WORKSPACE_RELAY),
    ("smtp_greylist", "rcpt"): _greylist_of(POSTGREY),
    ("smtp_greylist", "reply"): _greylist(
        RefusingReply(Phase.BODY, 451, "4.7.1", "Greylisting in action, please come back later")
    ),
    ("smtp_slow_reply", ""): dataclasses.replace(_BASE, reply_delay_s=SLOW_REPLY_S),
    ("smtp_account_blocked", "exchange"): dataclasses.replace(
        _BASE, always=EXCHANGE_BLOCKED.always
    ),
    # https://support.google.com/a/answer/3726730
    ("smtp_account_blocked", "gmail"): _always(
        Phase.MAIL, 550, "5.7.1", "Email quota exceeded. {id} - gsmtp"
    ),
    ("smtp_helo", ""): dataclasses.replace(_BASE, bad_helo=STRICT_POSTFIX.bad_helo),
    ("smtp_mailbox_full", ""): _always(
        Phase.RCPT, 452, "4.2.2", "<{recipient}>: the mailbox is full"
    ),
    ("smtp_unknown_recipient", ""): _always(
        Phase.RCPT, 550, "5.1.1", "<{recipient}>: User unknown", for_good=True
    ),
    ("smtp_content", ""): _always(
        Phase.BODY, 554, "5.7.1", "Message rejected because of its content", for_good=True
    ),
}
