"""The simulated mail provider of `outbox up`: its options, and its part of the output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import typer

from outbox_server.deploy.providers.catalog import PROFILES
from outbox_server.deploy.providers.describe import describe, shortened
from outbox_server.deploy.providers.embedded import EmbeddedProvider
from outbox_server.deploy.providers.profile import Profile, Rate
from outbox_server.shared.settings import Settings

NAMES: Final = ", ".join(PROFILES)
# Settings that are scaled with a provider's periods: a shorter day needs shorter waits.
_SCALED: Final = ("cooldown", "quota_day", "defer_backoff")
_SHORTEST_WAIT: Final = timedelta(milliseconds=1)
# The default of OUTBOX_MIN_GAP, which decides whether a sender can reach a quota.
_USUAL_GAP_S: Final = 2.0
# A user does not wait longer than this at a terminal.
_LONGEST_WAIT_S: Final = 240.0
# Long enough for 20 mails at that gap, and short enough to watch.
_SUGGESTED_PERIOD_S: Final = 86.4
# Mails scheduled beyond a quota, so that some wait.
_MAILS_BEYOND_QUOTA: Final = 10
_MOST_REPLIES: Final = 3


@dataclass(frozen=True, slots=True)
class ProviderChoice:
    """The chosen provider, and the factor (0.00001 to 1) that its times are multiplied by."""

    profile: Profile
    scale: float

    def settings(self, settings: Settings) -> Settings:
        """Return the settings, with waits scaled like the provider's periods.

        Settings that the user has set stay unchanged.
        """
        if self.scale == 1:
            return settings
        return settings.model_copy(
            update={
                name: _times(getattr(settings, name), self.scale)
                for name in _SCALED
                if name not in settings.model_fields_set
            }
        )


def read_provider(name: str) -> Profile:
    """Return the profile of a name.

    Raises:
        typer.BadParameter: there is no such provider.
    """
    if name not in PROFILES:
        raise typer.BadParameter(f"there is no provider {name!r}; choose one of {NAMES}")
    return PROFILES[name]


def chosen_provider(
    profile: Profile | None, *, scale: float | None, quota: int | None, smtp: str | None
) -> ProviderChoice | None:
    """Return the chosen provider; None if there is none.

    Raises:
        typer.BadParameter: the options contradict one another.
    """
    if profile is None:
        for option, value in (("--provider-scale", scale), ("--provider-quota", quota)):
            if value is not None:
                raise typer.BadParameter(f"{option} needs --provider")
        return None
    if smtp is not None:
        raise typer.BadParameter("--provider and --smtp exclude each other")
    if quota is not None:
        profile = profile.with_quota(quota)
    if scale is None:
        return ProviderChoice(profile, 1.0)
    return ProviderChoice(profile.scaled(scale), scale)


def lines_of(found: dict[str, Any], choice: ProviderChoice) -> Iterator[str]:
    """Return the lines that `outbox up` prints about a provider."""
    profile = choice.profile
    yield f"provider    {profile.title}, simulated; mails in {found['inbox']}"
    yield from (f"            - {line}" for line in describe(profile))
    longest = _longest(profile)
    if longest is not None and longest.seconds < longest.most * _USUAL_GAP_S:
        yield "            One sender cannot reach the last quota: it sends a mail every 2 s."
    if longest is not None and not _is_soon_reached(longest):
        scale = choice.scale * _SUGGESTED_PERIOD_S / longest.seconds
        yield (
            f"            --provider-quota 20 --provider-scale {min(scale, 1):.1g} lets you see it "
            "within two minutes."
        )


def steps_of(profile: Profile, outbox: str) -> list[str]:
    """Return example commands that reach the provider's limits and show the effect.

    Each works when pasted after the previous ones. `outbox` is the command's name in the shell.
    """
    longest = _longest(profile)
    soon = longest is not None and _is_soon_reached(longest)
    mails = _MAILS_BEYOND_QUOTA + (
        longest.most if longest is not None and soon else _MAILS_BEYOND_QUOTA
    )
    find_id = r"""sed -n 's/.*"sender_id": "\(.*\)".*/\1/p'"""
    create = f"{outbox} senders create --user acme --email news@example.com -o json"
    return [
        f"sender=$({create} | {find_id})",
        f"(echo email; seq -f 'person%g@example.org' {mails}) > people.csv",
        f"{outbox} schedule people.csv --sender $sender --subject Hello --body 'Good to see you.'",
        f"{outbox} senders get $sender",
        f"{outbox} jobs list --sender $sender",
        f"{outbox} stats forecast --sender $sender --recipient-count 5",
        f"{outbox} audit",
    ]


def closing_of_steps(outbox: str) -> list[str]:
    """Return further commands, each with its purpose."""
    return [
        f"Watch it live: {outbox} top --user acme",
        f"Explain why a mail waits, and until when: {outbox} jobs explain ID",
        f"Show every reply: {outbox} jobs attempts ID",
        f"End a cooldown early: {outbox} senders resume $sender",
    ]


def closing_line(provider: EmbeddedProvider) -> str:
    """Return the counts of a provider in one line, for people."""
    tally = provider.server.tally
    refused = sum(tally.refusals.values())
    most = tally.refusals.most_common(_MOST_REPLIES)
    replies = ", ".join(f"{number} x {shortened(reply)}" for reply, number in most)
    return (
        f"the provider accepted {_counted(tally.accepted, 'mail')} ({tally.copies} of them copies) "
        f"on {_counted(tally.connections, 'connection')}, and refused "
        f"{_counted(refused, 'time')}{': ' * bool(replies)}{replies}"
    )


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _longest(profile: Profile) -> Rate | None:
    """Return the provider's limit with the longest period, or None if it does not count mails."""
    return max(profile.rates, key=lambda rate: rate.seconds, default=None)


def _is_soon_reached(rate: Rate) -> bool:
    return rate.most * _USUAL_GAP_S <= min(rate.seconds, _LONGEST_WAIT_S)


def _times(value: Any, scale: float) -> Any:
    if isinstance(value, tuple):
        return tuple(_times(one, scale) for one in value)
    return max(value * scale, _SHORTEST_WAIT)
