"""Sending hours as instants, across time zones and clock changes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_server.shared.sending_hours import SendingHours

DAY = 24 * 60
ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/St_Johns",
    "Australia/Lord_Howe",
    "Asia/Kathmandu",
    "Pacific/Apia",
    "Africa/Casablanca",
    "America/Sao_Paulo",
]


def ms(text: str, zone: str = "UTC") -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


def is_shown(hours: SendingHours, at: int) -> bool:
    """Return whether local time is in an opening; not exact while the clocks are set back."""
    wall = datetime.fromtimestamp(at / 1000, UTC).astimezone(ZoneInfo(hours.zone))
    minute = wall.hour * 60 + wall.minute
    day = wall.isoweekday()
    if hours.end > hours.start:
        return hours.start <= minute < hours.end and _on(hours, day)
    yesterday = (day + 5) % 7 + 1
    return (minute >= hours.start and _on(hours, day)) or (
        minute < hours.end and _on(hours, yesterday)
    )


def _on(hours: SendingHours, day: int) -> bool:
    return not hours.weekdays or day in hours.weekdays


def is_set_back(zone: str, at: int) -> bool:
    """Return whether the clocks are set back within two hours of `at`."""
    found = datetime.fromtimestamp(at / 1000, UTC)
    around = [found + timedelta(minutes=15 * n) for n in range(-9, 10)]
    offsets = [each.astimezone(ZoneInfo(zone)).utcoffset() or timedelta(0) for each in around]
    return any(later < earlier for earlier, later in pairwise(offsets))


@given(
    weekdays=st.frozensets(st.integers(1, 7)),
    start=st.integers(0, DAY - 1),
    length=st.integers(1, DAY - 1),
    zone=st.sampled_from(ZONES),
    at=st.integers(ms("2005-01-01"), ms("2040-01-01")),
)
def test_opening_follows_the_local_clock(
    weekdays: frozenset[int], start: int, length: int, zone: str, at: int
) -> None:
    end = start + length
    hours = SendingHours(weekdays, start, end if end <= DAY else end - DAY, zone)
    opens = hours.opens(at)
    assert opens is not None
    assert opens >= at
    for look in {at, opens - 60_000, opens, hours.closes(opens) - 60_000, hours.closes(opens)}:
        if is_set_back(zone, look) or look < at:
            continue
        assert (hours.opens(look) == look) == is_shown(hours, look), look


@given(zone=st.sampled_from(ZONES), change=st.integers(2010, 2035), hour=st.integers(-6, 6))
def test_openings_do_not_overlap_and_are_open_throughout(zone: str, change: int, hour: int) -> None:
    hours = SendingHours(frozenset(), 90, 180, zone)
    at = ms(f"{change}-03-25") + hour * 3_600_000
    for _ in range(12):
        opens = hours.opens(at)
        assert opens is not None
        closes = hours.closes(opens)
        # An hour and a half, plus a clock change of up to two hours.
        assert 0 < closes - opens <= 210 * 60_000
        assert hours.opens((opens + closes) // 2) == (opens + closes) // 2
        at = closes
        assert hours.opens(at) != at


@pytest.mark.parametrize(
    ("hours", "at", "opens", "closes"),
    [
        # An ordinary Monday: before, within and after the hours.
        ((9, 17), "2026-11-23 08:00", "2026-11-23 09:00", "2026-11-23 17:00"),
        ((9, 17), "2026-11-23 12:00", "2026-11-23 12:00", "2026-11-23 17:00"),
        ((9, 17), "2026-11-27 17:00", "2026-11-30 09:00", "2026-11-30 17:00"),
        # Across midnight: Friday's opening belongs to Friday.
        ((22, 6), "2026-11-28 03:00", "2026-11-28 03:00", "2026-11-28 06:00"),
        ((22, 6), "2026-11-28 06:00", "2026-11-30 22:00", "2026-12-01 06:00"),
        # The clocks are set forward on Sunday, 29 March 2026, and back on 25 October.
        ((9, 17), "2026-03-27 17:00", "2026-03-30 09:00", "2026-03-30 17:00"),
        ((9, 17), "2026-10-23 17:00", "2026-10-26 09:00", "2026-10-26 17:00"),
    ],
)
def test_working_days_in_berlin_follow_the_local_clock(
    hours: tuple[int, int], at: str, opens: str, closes: str
) -> None:
    berlin = "Europe/Berlin"
    week = SendingHours(frozenset(range(1, 6)), hours[0] * 60, hours[1] * 60, berlin)
    found = week.opens(ms(at, berlin))
    assert found == ms(opens, berlin)
    assert week.closes(found) == ms(closes, berlin)


def test_a_skipped_local_time_means_the_skip_and_a_repeated_one_the_first() -> None:
    night = SendingHours(frozenset(), 150, 210, "Europe/Berlin")  # 02:30 to 03:30
    opens = night.opens(ms("2026-03-29 00:00"))
    assert opens == ms("2026-03-29 01:00")  # 03:00 local time, directly after 01:59
    assert night.closes(opens) == ms("2026-03-29 01:30")
    opens = night.opens(ms("2026-10-25 00:00"))
    assert opens == ms("2026-10-25 00:30")  # the first 02:30
    assert night.closes(opens) == ms("2026-10-25 02:30")


def test_consecutive_whole_days_are_one_opening() -> None:
    weekend = SendingHours(frozenset({6, 7}), 0, DAY, "Europe/Berlin")
    opens = weekend.opens(ms("2026-11-25 12:00"))
    assert opens == ms("2026-11-28 00:00", "Europe/Berlin")
    assert weekend.closes(opens) == ms("2026-11-30 00:00", "Europe/Berlin")


def test_sending_hours_are_stored_unchanged() -> None:
    hours = SendingHours(frozenset({1, 5}), 90, 180, "Europe/Berlin")
    assert SendingHours.from_text(hours.to_text()) == hours
