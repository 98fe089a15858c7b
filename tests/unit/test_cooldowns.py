"""The texts for a cooldown and for the reply that caused it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from outbox_server.shared.cooldowns.record import CooldownRecord
from outbox_server.shared.smtp.reply_text import MAX_SHOWN, describe_reply

NOW = datetime(2026, 11, 28, 10, 5, tzinfo=UTC)


def cooldown(probe: datetime) -> CooldownRecord:
    return CooldownRecord(
        since=datetime(2026, 11, 28, 10, 2, tzinfo=UTC),
        next_probe_at=probe,
        refusals=1,
        message="Daily user sending limit exceeded",
        smtp_code=550,
        enhanced_code="5.4.5",
    )


def test_a_cooldown_shows_its_start_its_reason_and_the_next_probe() -> None:
    # The time in the database's time zone.
    there = datetime(2026, 11, 28, 12, 7, tzinfo=timezone(timedelta(hours=2)))
    assert cooldown(there).describe(NOW) == (
        "The mail server has refused the sender's account since 2026-11-28 10:02:00 UTC (550 5.4.5 "
        "Daily user sending limit exceeded); the next probe is at 2026-11-28 10:07:00 UTC."
    )


def test_a_cooldown_without_a_code_reports_a_missing_access_token() -> None:
    refused = replace(cooldown(NOW), smtp_code=None, enhanced_code=None, message="OAuth 2.0: no")
    assert refused.refusal == (
        "The sender has had no access token since 2026-11-28 10:02:00 UTC (OAuth 2.0: no)"
    )


def test_a_due_probe_waits_only_for_the_limits() -> None:
    assert (
        cooldown(NOW)
        .describe(NOW)
        .endswith("; the next probe is sent when the sender's limits allow it.")
    )


@pytest.mark.parametrize(
    ("code", "enhanced", "text", "shown"),
    [
        (550, "5.4.5", "Daily limit", "550 5.4.5 Daily limit"),
        # The texts of many servers begin like this.
        (550, "5.4.5", "5.4.5 Daily limit", "550 5.4.5 Daily limit"),
        (550, "5.4.5", "5.4.5", "550 5.4.5"),
        (550, "5.4.5", "5.4.55 is another code", "550 5.4.5 5.4.55 is another code"),
        # Servers with ENHANCEDSTATUSCODES begin every line like this.
        (
            550,
            "5.4.5",
            "5.4.5 Daily limit\n5.4.5  of 20\n5.4.55 mails",
            "550 5.4.5 Daily limit of 20 5.4.55 mails",
        ),
        (421, None, "too many", "421 too many"),
        (421, "", "", "421"),
        (None, None, "the token was revoked", "the token was revoked"),
        (550, None, "first line\r\nsecond\tline", "550 first line second line"),
    ],
)
def test_a_reply_is_one_line_with_each_code_once(
    code: int | None, enhanced: str | None, text: str, shown: str
) -> None:
    assert describe_reply(code, enhanced, text) == shown


def test_a_long_reply_is_cut() -> None:
    shown = describe_reply(550, "5.4.5", "x" * 10_000)
    assert len(shown) == MAX_SHOWN
    assert shown.startswith("550 5.4.5 xxx")
    assert shown.endswith("x...")
