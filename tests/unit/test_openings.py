"""The forecast over real sending hours: weekdays, time zones and clock changes."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from outbox_server.shared.forecast.microseconds import from_us, to_us
from outbox_server.shared.forecast.openings import Openings
from outbox_server.shared.forecast.simulation import Bound, JobGroup, Limiter, simulate
from outbox_server.shared.sending_hours import SendingHours
from tests.unit.test_simulation import HOUR, SECOND, one_by_one

ZONES = ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Apia", "UTC"]
# Spring, autumn, the day that Apia skipped, and a time without clock changes.
CHANGES = [(2026, 3, 27), (2026, 10, 23), (2026, 11, 1), (2011, 12, 28), (2026, 4, 3), (2026, 6, 1)]
MINUTE = 60 * SECOND


def openings(days: str, start: str, end: str, zone: str) -> Openings:
    minutes = [int(text[:2]) * 60 + int(text[3:]) for text in (start, end)]
    return Openings(SendingHours(frozenset(map(int, days)), minutes[0], minutes[1], zone))


def at(text: str, zone: str = "UTC") -> int:
    return to_us(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC))


@pytest.mark.parametrize("seed", range(20))
def test_the_forecast_across_a_clock_change_equals_a_simulation_mail_by_mail(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(10):
        now = to_us(datetime(*chance.choice(CHANGES), tzinfo=UTC)) + chance.randrange(48 * HOUR)
        start = chance.randrange(0, 24 * 60)
        length = chance.choice([30, 60, 150, 8 * 60, 23 * 60, 24 * 60 - 1])
        weekdays = frozenset(chance.sample(range(1, 8), chance.choice([0, 0, 2, 5])))
        hours = SendingHours(weekdays, start, (start + length) % 1440, chance.choice(ZONES))
        limiter = Limiter(
            limit=chance.choice([1, 5, 20]),
            gap=chance.choice([0, 2 * SECOND, 13 * MINUTE]),
            window=HOUR,
            takes=chance.choice([0, 1_234_567]),
            hours=Openings(hours),
        )
        groups, due = [], now
        for _ in range(chance.randrange(1, 4)):
            group = JobGroup(
                due,
                count := chance.randrange(1, 60),
                step=chance.choice([0, 10 * MINUTE]),
                mine=chance.choice([0, count]),
                expire_after=chance.choice([None, None, 5 * HOUR]),
            )
            groups.append(group)
            due = group.last_due + chance.randrange(6 * HOUR)
        starts, expired = one_by_one(limiter, groups, now)
        found = simulate(limiter, groups, now)
        assert (found.first, found.last, found.expiring) == (
            starts[0] if starts else None,
            starts[-1] if starts else None,
            expired,
        ), (limiter, groups, now)


@pytest.mark.parametrize(
    ("now", "opens", "utc"),
    [
        # The same hours in Berlin: an hour earlier in UTC from March 29th on, and as before in
        # October.
        ("2026-03-27 15:00", "2026-03-30 09:00", "2026-03-30 07:00"),
        ("2026-10-23 15:00", "2026-10-26 09:00", "2026-10-26 08:00"),
    ],
)
def test_mail_left_on_friday_is_sent_on_monday_after_a_clock_change(
    now: str, opens: str, utc: str
) -> None:
    berlin = "Europe/Berlin"
    limiter = Limiter(20, 2 * SECOND, HOUR, hours=openings("12345", "09:00", "17:00", berlin))
    # 15:00 and 16:00 have 20 sends each. The window has room again from 17:00 on, which is too
    # late.
    found = simulate(limiter, [JobGroup(at(now, berlin), 41, mine=41)], at(now, berlin))
    assert found.last == at(opens, berlin) == at(utc)
    assert found.bound is Bound.HOURS


def test_fractions_of_a_millisecond_are_kept_and_boundaries_are_exact() -> None:
    hours = openings("", "09:00", "17:00", "UTC")
    inside = at("2026-06-01 12:00") + 123
    assert hours.opens(inside) == inside
    end = at("2026-06-01 17:00")
    assert hours.closes(inside) == end
    assert hours.opens(end - 1) == end - 1
    assert hours.opens(end) == at("2026-06-02 09:00")


def test_hours_beyond_the_calendar_give_no_forecast_end() -> None:
    late = to_us(datetime(9999, 12, 31, 23, tzinfo=UTC))
    hours = openings("1", "09:00", "10:00", "Europe/Berlin")
    assert hours.opens(late) is None
    found = simulate(Limiter(1, 0, HOUR, hours=hours), [JobGroup(late, 5, mine=5)], late)
    assert (found.end, found.within_sight) == (None, False)


def test_forecasting_a_million_mails_over_years_of_working_days_is_fast() -> None:
    hours = openings("12345", "09:00", "17:00", "Europe/Berlin")
    now = at("2026-11-25 14:00")
    # CPU time of this process: a busy machine does not increase it.
    began = time.thread_time()
    found = simulate(
        Limiter(200, 2 * SECOND, HOUR, hours=hours), [JobGroup(now, 10**6, mine=10**6)], now
    )
    assert found.last is not None
    # 1,600 per day: 625 working days.
    assert from_us(found.last).year == 2029
    assert time.thread_time() - began < 2
