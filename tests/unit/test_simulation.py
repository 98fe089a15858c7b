"""The forecast's arithmetic compared with the plain recursion, one mail after the other."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from hypothesis import settings

from outbox_server.shared.forecast.simulation import (
    MOST_WORK,
    Bound,
    Hours,
    JobGroup,
    Limiter,
    Sends,
    SimulatedOutcome,
    simulate,
)

SECOND = 1_000_000
HOUR = 3_600 * SECOND
DAY = 24 * HOUR


@dataclass(frozen=True)
class DailyHours:
    """Open from `first` to `last` of every `period`."""

    first: int
    last: int
    period: int = DAY

    def opens(self, at: int) -> int | None:
        within = at % self.period
        if within < self.first:
            return at - within + self.first
        if within < self.last:
            return at
        return at - within + self.period + self.first

    def closes(self, at: int) -> int | None:
        return at - at % self.period + self.last


def one_by_one(limiter: Limiter, groups: Sequence[JobGroup], now: int) -> tuple[list[int], int]:
    """Return the starts of the sends of `mine`, and how many of these mails expire."""
    takes = limiter.takes
    cycle = limiter.gap + takes
    if not limiter.gap:
        cycle = takes // max(1, min(limiter.max_in_flight, limiter.limit))
    starts = [
        sends.first - takes + i * sends.step for sends in limiter.sent for i in range(sends.count)
    ]
    last = now - cycle if limiter.last_end is None else limiter.last_end - takes
    mine, expired = [], 0
    for group in groups:
        for i in range(group.count):
            due = group.due + i * group.step
            start = max(now, due, last + cycle, limiter.next_probe or 0)
            if len(starts) >= limiter.limit:
                start = max(start, starts[-limiter.limit] + limiter.window + takes)
            if limiter.hours:
                opening = limiter.hours.opens(start)
                assert opening is not None
                start = opening
            if group.expire_after is not None and start - due > group.expire_after:
                expired += bool(group.mine)
                continue
            starts.append(start)
            last = start
            if group.mine:
                mine.append(start)
    return mine, expired


def random_case(chance: random.Random) -> tuple[Limiter, list[JobGroup], int]:
    now = chance.randrange(1_000, 2_000)
    window = chance.randrange(20, 400)
    sent, at = [], now - window
    for _ in range(chance.randrange(0, 6)):
        count, step = chance.randrange(1, 5), chance.randrange(0, 9)
        at += chance.randrange(0, 30)
        if at + (count - 1) * step > now:
            break
        sent.append(Sends(at, count, step))
        at += (count - 1) * step
    hours: Hours | None = None
    if chance.random() < 0.4:
        first = chance.randrange(0, 100)
        hours = DailyHours(first, first + chance.randrange(1, 100), 250)
    groups, due = [], now - 50
    for _ in range(chance.randrange(1, 6)):
        count = chance.randrange(1, 60)
        due += chance.randrange(0, 100)
        group = JobGroup(
            due,
            count,
            step=0 if chance.random() < 0.5 else chance.randrange(1, 30),
            mine=count if chance.random() < 0.6 else 0,
            expire_after=None if chance.random() < 0.7 else chance.randrange(0, 300),
        )
        groups.append(group)
        due = group.last_due
    limiter = Limiter(
        limit=chance.choice([1, 2, 3, 5, 10, 40]),
        gap=chance.choice([0, 0, 1, 2, 5, 20]),
        window=window,
        max_in_flight=chance.choice([1, 2, 5]),
        takes=chance.choice([0, 0, 1, 3]),
        hours=hours,
        sent=tuple(sent),
        last_end=at if sent else None,
        next_probe=None if chance.random() < 0.7 else now + chance.randrange(-50, 300),
    )
    return limiter, groups, now


@pytest.mark.parametrize("seed", range(40))
def test_the_forecast_equals_a_simulation_mail_by_mail(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(settings().max_examples):
        limiter, groups, now = random_case(chance)
        starts, expired = one_by_one(limiter, groups, now)
        found = simulate(limiter, groups, now)
        assert (found.first, found.last, found.expiring) == (
            starts[0] if starts else None,
            starts[-1] if starts else None,
            expired,
        ), (limiter, groups, now)


def after(limiter: Limiter, count: int, **group: int) -> SimulatedOutcome:
    return simulate(limiter, [JobGroup(0, count, mine=count, **group)], 0)


def test_a_batch_takes_a_gap_for_each_mail_but_the_first() -> None:
    limiter = Limiter(5_000, 2 * SECOND, HOUR)
    assert after(limiter, 1).end == 0
    found = after(limiter, 31)
    assert (found.end, found.bound) == (60 * SECOND, Bound.GAP)


def test_a_full_window_empties_as_it_was_filled() -> None:
    limiter = Limiter(20, 2 * SECOND, HOUR)
    assert after(limiter, 20).end == 38 * SECOND
    found = after(limiter, 21)
    assert (found.end, found.bound) == (HOUR, Bound.WINDOW)
    assert after(limiter, 200).end == 9 * HOUR + 38 * SECOND


def test_sends_already_in_the_window_count() -> None:
    limiter = Limiter(20, 2 * SECOND, HOUR, sent=[Sends(-600 * SECOND, 20, SECOND)])
    assert after(limiter, 1).end == 3_000 * SECOND


def test_the_duration_of_a_send_is_added_to_the_gap() -> None:
    limiter = Limiter(5_000, 2 * SECOND, HOUR, takes=SECOND)
    assert after(limiter, 3).end == 7 * SECOND


def test_without_a_gap_max_in_flight_decides() -> None:
    limiter = Limiter(5_000, 0, HOUR, takes=SECOND, max_in_flight=5)
    assert after(limiter, 51).end == 11 * SECOND


def test_a_spacing_binds_if_the_limits_allow_more() -> None:
    found = after(Limiter(5_000, 2 * SECOND, HOUR), 10, step=5 * SECOND)
    assert (found.end, found.bound) == (45 * SECOND, Bound.SPACING)


def test_only_other_mail_that_is_due_earlier_delays_the_forecast() -> None:
    limiter = Limiter(5_000, 2 * SECOND, HOUR)
    groups = [JobGroup(0, 5), JobGroup(1, 1, mine=1), JobGroup(2, 1_000)]
    found = simulate(limiter, groups, 0)
    assert (found.end, found.sends) == (10 * SECOND, 6)


def test_nothing_is_sent_before_it_is_due() -> None:
    limiter = Limiter(5_000, 2 * SECOND, HOUR)
    found = simulate(limiter, [JobGroup(HOUR, 10, mine=10)], 0)
    assert (found.first, found.end) == (HOUR, HOUR + 18 * SECOND)


def test_nothing_is_sent_before_the_next_probe_of_a_cooldown() -> None:
    limiter = Limiter(5_000, 2 * SECOND, HOUR, next_probe=5 * HOUR)
    found = after(limiter, 10)
    assert (found.first, found.end) == (5 * HOUR, 5 * HOUR + 18 * SECOND)
    assert found.bound is Bound.COOLDOWN
    # It does not delay later mail.
    assert after(replace(limiter, next_probe=-SECOND), 10).end == 18 * SECOND
    assert simulate(limiter, [JobGroup(6 * HOUR, 1, mine=1)], 0).first == 6 * HOUR


def test_a_probe_outside_the_sending_hours_waits_for_them() -> None:
    hours = DailyHours(8 * HOUR, 10 * HOUR)
    limiter = Limiter(5_000, 2 * SECOND, HOUR, hours=hours, next_probe=11 * HOUR)
    assert after(limiter, 1).first == DAY + 8 * HOUR


def test_mail_that_does_not_fit_into_the_hours_of_a_day_is_sent_on_the_next() -> None:
    limiter = Limiter(100, 2 * SECOND, HOUR, hours=DailyHours(8 * HOUR, 10 * HOUR))
    found = after(limiter, 250)
    assert found.first == 8 * HOUR
    assert found.end == DAY + 8 * HOUR + 98 * SECOND
    assert found.bound is Bound.HOURS


def test_mail_that_would_be_late_expires_and_takes_no_slot() -> None:
    limiter = Limiter(10, 2 * SECOND, HOUR)
    found = after(limiter, 100, expire_after=3 * HOUR + 1)
    assert (found.expiring, found.sends, found.end) == (69, 31, 3 * HOUR)


def test_if_all_mail_expires_there_is_no_forecast_end() -> None:
    limiter = Limiter(1, 0, HOUR, sent=[Sends(0)])
    found = after(limiter, 5, expire_after=60 * SECOND)
    assert (found.end, found.expiring) == (None, 5)


def test_hours_that_never_open_again_give_no_forecast_end() -> None:
    class Never:
        def opens(self, at: int) -> int | None:  # noqa: ARG002 - the protocol's signature
            return None

        def closes(self, at: int) -> int | None:
            raise AssertionError(at)

    found = after(Limiter(1, 0, HOUR, hours=Never()), 5)
    assert (found.end, found.within_sight) == (None, False)


@pytest.mark.parametrize("limit", [1, 7, 200, 5_000, 1_000_000])
@pytest.mark.parametrize("gap", [0, 1_000, 2 * SECOND])
@pytest.mark.parametrize("step", [0, SECOND])
def test_forecasting_ten_million_mails_costs_no_more_than_a_hundred(
    limit: int, gap: int, step: int
) -> None:
    chance = random.Random(limit)
    ends = sorted(chance.randrange(-HOUR, 0) for _ in range(min(limit, 1_000)))
    limiter = Limiter(limit, gap, HOUR, takes=100_000, sent=[Sends(end) for end in ends])
    # CPU time of this process: a busy machine does not increase it.
    began = time.thread_time()
    assert after(limiter, 10_000_000, step=step).end is not None
    # Each day's opening is computed separately. A limit of 1 permits 8 mails per day.
    in_hours = replace(limiter, hours=DailyHours(9 * HOUR, 17 * HOUR))
    assert after(in_hours, 10_000 if limit == 1 else 100_000, step=step).end is not None
    assert time.thread_time() - began < 2


class CountedHours(DailyHours):
    """Hours that count how often they are asked."""

    asked: ClassVar[int] = 0

    def opens(self, at: int) -> int | None:
        CountedHours.asked += 1
        return super().opens(at)


@pytest.mark.parametrize(
    ("limiter", "step", "expire_after"),
    [
        # A day with an opening for each mail.
        (Limiter(100, SECOND, HOUR), 600_000 * SECOND, None),
        # Openings of a minute, in which few mails are sent.
        (Limiter(100, SECOND, HOUR), 0, None),
        # A gap of a day, which never fits the openings.
        (Limiter(1, 24 * HOUR, HOUR, takes=SECOND), 0, None),
        # Each mail expires before the next opening, but for some.
        (Limiter(100, SECOND, HOUR), 7 * HOUR, 60 * SECOND),
        # One mail per window, with a long window.
        (Limiter(1, SECOND, 24 * HOUR - SECOND), 0, None),
    ],
)
def test_the_work_of_a_forecast_is_bounded_and_the_rest_is_estimated(
    limiter: Limiter, step: int, expire_after: int | None
) -> None:
    count = 10_000_000
    CountedHours.asked = 0
    limiter = replace(limiter, hours=CountedHours(9 * HOUR, 9 * HOUR + 60 * SECOND))
    found = simulate(limiter, [JobGroup(0, count, step, count, expire_after)], 0)
    assert CountedHours.asked <= MOST_WORK / 10
    assert found.estimated
    assert found.within_sight
    assert found.end is not None
    assert found.end >= (count - 1) * step
    assert 0 <= found.expiring < count
    assert found.sends <= count


@pytest.mark.parametrize("most_work", [300, 1_000, 10_000])
def test_an_estimate_is_close_to_the_exact_forecast(most_work: int) -> None:
    limiter = Limiter(10, 2 * SECOND, HOUR, takes=SECOND, hours=DailyHours(9 * HOUR, 17 * HOUR))
    others, mine = JobGroup(0, 50_000), JobGroup(0, 50_000, mine=25_000)
    exact = simulate(limiter, [others, mine], 0, most_work=10**9)
    near = simulate(limiter, [others, mine], 0, most_work=most_work)
    assert not exact.estimated
    assert near.estimated
    assert exact.first is not None
    assert exact.end is not None
    assert near.first == pytest.approx(exact.first, rel=0.1)
    assert near.end == pytest.approx(exact.end, rel=0.1)
    assert near.sends == pytest.approx(exact.sends, rel=0.01)
    assert near.bound is exact.bound
