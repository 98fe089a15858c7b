from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_server.shared.intake.schedule_times import (
    BadScheduleTime,
    check_time_zone,
    parse_schedule_time,
)


def refusal(text: str, zone: str = "", default: str = "UTC") -> BadScheduleTime:
    with pytest.raises(BadScheduleTime) as caught:
        parse_schedule_time(text, zone, default)
    return caught.value


@pytest.mark.parametrize(
    ("text", "zone", "expected"),
    [
        ("2026-11-24T09:00:00Z", "", "2026-11-24T09:00:00"),
        ("2026-11-24t09:00:00z", "", "2026-11-24T09:00:00"),
        ("2026-11-24T09:00:00+01:00", "", "2026-11-24T08:00:00"),
        ("2026-11-24T09:00:00-05:30", "Europe/Berlin", "2026-11-24T14:30:00"),
        (" 2026-11-24 09:00 ", "", "2026-11-24T09:00:00"),
        ("2026-11-24 09:00 +01:00", "", "2026-11-24T08:00:00"),
        ("2026-11-24 09:00", "Europe/Berlin", "2026-11-24T08:00:00"),
        ("2026-07-24T09:00:00", "Europe/Berlin", "2026-07-24T07:00:00"),
        ("2026-07-24T09:00:00.25", "Asia/Kolkata", "2026-07-24T03:30:00.250000"),
        ("2026-07-24T09:00:00.123456789Z", "", "2026-07-24T09:00:00.123456"),
        ("2026-10-25T02:30:00+02:00", "Europe/Berlin", "2026-10-25T00:30:00"),
        ("2028-02-29 12:00", "", "2028-02-29T12:00:00"),
        ("2026-11-24T09:00:00+0100", "", "2026-11-24T08:00:00"),
        ("2026-11-24T09:00:00+01", "", "2026-11-24T08:00:00"),
        ("2026-11-24 09:00 -0530", "Europe/Berlin", "2026-11-24T14:30:00"),
        ("2026-11-24 09:00-05", "", "2026-11-24T14:00:00"),
        ("2026-11-24 09:00:00.5+00", "", "2026-11-24T09:00:00.5"),
    ],
)
def test_a_time_is_read_as_one_instant(text: str, zone: str, expected: str) -> None:
    assert parse_schedule_time(text, zone) == datetime.fromisoformat(expected).replace(tzinfo=UTC)


def test_a_row_without_a_zone_uses_that_of_the_batch() -> None:
    expected = datetime(2026, 11, 24, 8, tzinfo=UTC)
    assert parse_schedule_time("2026-11-24 09:00", "", "Europe/Berlin") == expected
    assert parse_schedule_time("2026-11-24 08:00", "UTC", "Europe/Berlin") == expected


@pytest.mark.parametrize(
    "text",
    [
        "tomorrow",
        "24.11.2026 09:00",
        "2026-11-24",
        "09:00",
        "2026-W48-2T09:00",
        "20261124T0900",
        "2026-11-24T24:00",
        "2026-11-24T09:60",
        "2026-11-24T09:00:60Z",
        "2026-11-24T09:00+25:00",
        "2026-11-24T09:00+01:60",
        "2026-11-24T09:00+0199",
        "2026-11-24T09:00+2500",
        "2026-11-24T09:00+99",
        "2026-11-24T09:00+1",
        "2026-11-24T09:00+010",
        "2026-11-24T09:00+01:0",
        "2026-11-24T09:00+01:",
        "2026-11-24T09:00 CET",
        "2026-11-24T09:00:00Zx",
        "٢٠٢٦-11-24T09:00",
        "x" * 200000,
        "0001-01-01T00:00+10:00",
        "9999-12-31T23:59-10:00",
    ],
)
def test_an_invalid_time_is_refused(text: str) -> None:
    error = refusal(text)
    assert (error.column, error.reason) == ("schedule_time", "SCHEDULE_TIME_INVALID")
    assert len(error.message) < 200


def test_a_date_that_does_not_exist_is_refused() -> None:
    error = refusal("2026-02-30T09:00:00Z")
    assert error.reason == "SCHEDULE_TIME_INVALID"
    assert "the date 2026-02-30 does not exist" in error.message


@pytest.mark.parametrize(
    "zone",
    [
        "Mars/Phobos",
        "Europe",
        "../UTC",
        "/etc/passwd",
        "right/UTC",
        "posix/UTC",
        "CEST",
        "a\x00b",
        "�",
        "Europe/Berlin/x",
        pytest.param("x" * 5000, id="long"),
    ],
)
def test_an_unknown_time_zone_is_refused_even_beside_an_offset(zone: str) -> None:
    for text in ("2026-11-24T09:00", "2026-11-24T09:00Z"):
        error = refusal(text, zone)
        assert (error.column, error.reason) == ("time_zone", "UNKNOWN_TIME_ZONE")


def test_an_empty_zone_counts_as_unset() -> None:
    with pytest.raises(BadScheduleTime):
        check_time_zone("")
    assert check_time_zone("Europe/Berlin") == ZoneInfo("Europe/Berlin")


def test_a_local_time_that_the_clocks_skip_is_refused_with_the_rule() -> None:
    error = refusal("2026-03-29T02:30", "Europe/Berlin")
    assert error.reason == "LOCAL_TIME_DOES_NOT_EXIST"
    assert "2026-03-29 02:30:00 does not exist in Europe/Berlin" in error.message
    assert "from UTC+01:00 to UTC+02:00" in error.message


def test_an_ambiguous_local_time_is_refused_with_both_offsets() -> None:
    error = refusal("2026-10-25 02:30", "", "Europe/Berlin")
    assert error.reason == "LOCAL_TIME_AMBIGUOUS"
    assert "UTC+02:00 and at UTC+01:00" in error.message
    assert "2026-10-25T02:30:00+02:00" in error.message
    west = refusal("2026-11-01T01:30", "America/New_York")
    assert "UTC-04:00 and at UTC-05:00" in west.message


@given(
    moment=st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2037, 1, 1)),  # noqa: DTZ001
    zone=st.sampled_from(
        ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"]
    ),
)
def test_an_instant_written_in_local_time_is_read_back_or_refused_as_ambiguous(
    moment: datetime, zone: str
) -> None:
    instant = moment.replace(tzinfo=UTC)
    local = instant.astimezone(ZoneInfo(zone))
    assert parse_schedule_time(local.isoformat(), zone) == instant
    try:
        assert parse_schedule_time(local.replace(tzinfo=None).isoformat(), zone) == instant
    except BadScheduleTime as error:
        twins = [
            (instant + timedelta(minutes=m)).astimezone(ZoneInfo(zone)) for m in (-60, -30, 30, 60)
        ]
        assert error.reason == "LOCAL_TIME_AMBIGUOUS"  # noqa: PT017
        assert local.replace(tzinfo=None) in [twin.replace(tzinfo=None) for twin in twins]
