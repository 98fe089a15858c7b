"""Describes the limits of a provider for people."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Final

from outbox_server.deploy.providers.policy import reply_of
from outbox_server.deploy.providers.profile import (
    FULL_PREFIX,
    UNKNOWN_PREFIX,
    Profile,
    RefusingReply,
)
from outbox_server.shared.durations import format_duration

_LONGEST_REPLY: Final = 100
_FIELD: Final = re.compile(r"\{\w+\}")


def describe(profile: Profile) -> list[str]:
    """Return one line per limit of a provider, with its reply beyond the limit."""
    return list(_lines(profile))


def _lines(profile: Profile) -> Iterator[str]:
    for reply in profile.always:
        yield f"refuses every mail: {_short(reply)}"
    for rate in profile.rates:
        most = f"{rate.most:,} mail{'s' * (rate.most != 1)}"
        yield f"{most} of an account in any {_period(rate.seconds)}, then: {_short(rate.refusal)}"
    if profile.mails_per_connection is not None:
        cap = profile.mails_per_connection
        yield f"{cap.most:,} mails per connection, then: {_short(cap.refusal)}"
    if profile.connections is not None:
        cap = profile.connections
        yield f"{cap.most:,} connections at once, then: {_short(cap.refusal)}"
    if profile.greylist is not None:
        greylist = profile.greylist
        yield (
            f"a sender and recipient must be known for {_period(greylist.delay_s)}, until then: "
            f"{_short(greylist.refusal)}"
        )
    if profile.bad_helo is not None:
        yield f"a fully qualified name in EHLO, else: {_short(profile.bad_helo)}"
    if profile.reply_delay_s:
        yield f"replies {_period(profile.reply_delay_s)} after the end of each mail"
    yield f"{UNKNOWN_PREFIX}...@ is permanently refused: {_short(profile.unknown_recipient)}"
    yield (
        f"{FULL_PREFIX}...@ is refused for {_period(profile.full_for_s)}: "
        f"{_short(profile.full_mailbox)}"
    )


def _short(reply: RefusingReply) -> str:
    return shortened(reply_of(reply.code, reply.text.partition("\n")[0], reply.enhanced))


def shortened(reply: str) -> str:
    """Return the first words of a reply, with dots for what varies."""
    text = _FIELD.sub("...", reply)
    return text if len(text) <= _LONGEST_REPLY else f"{text[:_LONGEST_REPLY]}..."


def _period(seconds: float) -> str:
    return format_duration(timedelta(seconds=seconds))
