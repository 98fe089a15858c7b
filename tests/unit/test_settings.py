"""An invalid variable prevents the start; one line names it and says which values are valid."""

from __future__ import annotations

from datetime import timedelta

import pytest

from outbox_server.shared.durations import format_duration, parse_duration
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import load_settings


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("SMTP_TIMEOUT", "30", "'30' is not a duration; write 250ms, 2s, 5m or 1h"),
        ("SMTP_TIMEOUT", "0", "must be greater than 0 seconds"),
        ("SMTP_END_TIMEOUT", "ten", "'ten' is not a duration"),
        ("SMTP_MAILS_PER_CONNECTION", "0", "must be greater than or equal to 1"),
        ("QUOTA_DAY", "30d", "must be less than or equal to 7 days"),
        ("COOLDOWN", "", "write at least one duration, such as 5m"),
        ("COOLDOWN", "5m,x", "'x' is not a duration"),
        # Without a wait, probes would follow one another as fast as the server answers.
        ("COOLDOWN", "5m,0", "each must be more than 0 and at most 30d"),
        ("DEFER_BACKOFF", "0s", "each must be more than 0 and at most 30d"),
        # A date cannot represent that time.
        ("COOLDOWN", "9999999d", "each must be more than 0 and at most 30d"),
        ("DEFER_BACKOFF", ",", "write at least one duration"),
        ("RETENTION", "90", "'90' is not a duration"),
        # Sends that the limiter may need after a loss of Redis would be removed.
        ("RETENTION", "23h", "must be 0 or at least 1d (the longest gap) (got 23h)"),
        ("REFUSALS_IN_A_ROW", "-1", "must be greater than or equal to 0"),
        ("REFUSALS_IN_A_ROW", "many", "must be a whole number ("),
        ("REFUSALS_IN_A_ROW", "1.5", "must be a whole number ("),
        ("REFUSALS_IN_A_ROW", "9" * 5_000, "is too large ("),
        ("PLAINTEXT", "perhaps", "must be true or false ("),
        ("SPECIAL_DOMAINS", "some", "must be 'allow' or 'refuse'"),
    ],
)
def test_an_invalid_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, complaint: str
) -> None:
    monkeypatch.setenv(f"OUTBOX_{name}", value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    message = caught.value.message
    assert message.startswith(f"OUTBOX_{name}: {complaint}")
    assert "Value error" not in message
    assert "\n" not in message


@pytest.mark.parametrize("longer", ["RATE_WINDOW", "QUOTA_DAY"])
def test_retention_keeps_the_sends_that_a_limit_counts(
    monkeypatch: pytest.MonkeyPatch, longer: str
) -> None:
    monkeypatch.setenv(f"OUTBOX_{longer}", "7d")
    monkeypatch.setenv("OUTBOX_RETENTION", "6d")
    with pytest.raises(ConfigurationError, match=rf"at least OUTBOX_{longer} \(7d\)"):
        load_settings()
    monkeypatch.setenv("OUTBOX_RETENTION", "7d")
    assert load_settings().retention == timedelta(days=7)


@pytest.mark.parametrize("text", ["", "0", "0d"])
def test_without_retention_nothing_is_removed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OUTBOX_RETENTION", text)
    assert load_settings().retention is None


def test_a_limit_for_every_phase_may_be_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().smtp_timeout is None
    monkeypatch.setenv("OUTBOX_SMTP_TIMEOUT", "30s")
    assert load_settings().smtp_timeout == timedelta(seconds=30)


@pytest.mark.parametrize(
    ("time", "text"),
    [
        (timedelta(0), "0ms"),
        (timedelta(milliseconds=86_400), "86.4s"),
        (timedelta(milliseconds=123_456_789), "123456.789s"),
        (timedelta(seconds=90), "90s"),
        (timedelta(milliseconds=60), "60ms"),
    ],
)
def test_a_duration_is_written_in_the_format_that_is_read(time: timedelta, text: str) -> None:
    assert format_duration(time) == text
    assert parse_duration(text) == time
