from __future__ import annotations

from datetime import timedelta

import pytest

from outbox_server.cli.simulated_provider import ProviderChoice, chosen_provider, lines_of
from outbox_server.deploy.providers.catalog import PROFILES
from outbox_server.deploy.providers.google import GMAIL
from outbox_server.deploy.providers.profile import DAY_S
from outbox_server.shared.settings import load_settings


def choice(scale: float | None = None, quota: int | None = None) -> ProviderChoice:
    chosen = chosen_provider(GMAIL, scale=scale, quota=quota, smtp=None)
    assert chosen is not None
    return chosen


def test_the_waits_of_outbox_are_scaled_with_the_providers_periods() -> None:
    settings = choice(scale=0.001).settings(load_settings())
    assert settings.quota_day == timedelta(seconds=86.4)
    assert settings.cooldown[0] == timedelta(seconds=0.3)
    assert settings.defer_backoff[-1] == timedelta(seconds=3.6)
    # Only set fields are passed to the services.
    assert {"quota_day", "cooldown", "defer_backoff"} <= settings.model_fields_set


def test_waits_set_by_the_user_are_not_scaled() -> None:
    given = load_settings(cooldown=(timedelta(seconds=7),))
    settings = choice(scale=0.001).settings(given)
    assert settings.cooldown == (timedelta(seconds=7),)
    assert settings.quota_day == timedelta(seconds=86.4)


def test_without_a_scale_nothing_changes() -> None:
    settings = load_settings()
    assert choice().settings(settings) is settings
    assert choice().profile == GMAIL


def test_quota_and_scale_shape_the_profile() -> None:
    longest = choice(scale=0.001, quota=20).profile.rates[-1]
    assert (longest.most, longest.seconds) == (20, DAY_S * 0.001)


@pytest.mark.parametrize(
    ("name", "scale", "quota", "advice"),
    [
        # A day of 86.4 s holds 20 mails, two seconds apart.
        ("gmail", 0.001, 20, ""),
        ("gmail", None, None, "--provider-quota 20 --provider-scale 0.001 "),
        # An hour of 3.6 s ends before the quota is used up.
        ("ionos", 0.001, 20, "--provider-quota 20 --provider-scale 0.02 "),
        ("plain", None, None, ""),
    ],
)
def test_up_prints_the_options_that_reach_the_quota(
    name: str, scale: float | None, quota: int | None, advice: str
) -> None:
    chosen = chosen_provider(PROFILES[name], scale=scale, quota=quota, smtp=None)
    assert chosen is not None
    printed = "\n".join(lines_of({"inbox": "inbox"}, chosen))
    assert ("lets you see it" in printed) is bool(advice)
    assert advice in printed
