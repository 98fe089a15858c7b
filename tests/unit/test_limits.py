"""Which limit of a sender binds, and when a batch will be done."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from services.scheduler.limits import Limits, WindowUse, forecast_end

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("hourly_limit", "gap_s", "effective", "gap_binds"),
    [
        (1_000, 2, 1_000, False),
        (1_800, 2, 1_800, False),
        (1_801, 2, 1_800, True),
        (5_000, 2, 1_800, True),
        (5_000, 0, 5_000, False),
        (5, 7_200, 1, True),
        (1, 7_200, 1, False),
        (600, 7, 514, True),
    ],
)
def test_the_smaller_of_limit_and_hour_over_gap_binds(
    hourly_limit: int, gap_s: int, effective: int, *, gap_binds: bool
) -> None:
    limits = Limits(hourly_limit, gap_s * SECOND)
    assert (limits.effective_hourly_limit, limits.gap_binds) == (effective, gap_binds)
    assert bool(limits.notice()) == gap_binds


@pytest.mark.parametrize(
    ("min_gap_ms", "floor_s", "gap_s"), [(None, 2, 2), (3_000, 2, 3), (1_000, 2, 2), (0, 0, 0)]
)
def test_the_floor_holds_for_senders_that_were_made_before_it(
    min_gap_ms: int | None, floor_s: int, gap_s: int
) -> None:
    assert Limits.of(10, min_gap_ms, floor_s * SECOND).gap == gap_s * SECOND


def end_after(limits: Limits, jobs: int, **more: object) -> timedelta:
    fields = {"now": NOW, "start": NOW, "last_due": NOW, **more}
    end = forecast_end(limits, jobs=jobs, **fields)  # type: ignore[arg-type]
    assert end is not None
    return end - NOW


def test_a_batch_takes_a_gap_for_each_mail_but_the_first() -> None:
    assert end_after(Limits(5_000, 2 * SECOND), 1) == 0 * SECOND
    assert end_after(Limits(5_000, 2 * SECOND), 31) == 60 * SECOND


def test_a_full_window_empties_as_it_was_filled() -> None:
    limits = Limits(20, 2 * SECOND)
    assert end_after(limits, 20) == 38 * SECOND
    assert end_after(limits, 21) == HOUR
    assert end_after(limits, 200) == 9 * HOUR + 38 * SECOND


def test_what_was_sent_in_the_window_counts() -> None:
    used = WindowUse(20, NOW - 10 * 60 * SECOND)
    assert end_after(Limits(20, 2 * SECOND), 1, used=used) == 50 * 60 * SECOND


def test_other_mail_of_the_sender_comes_first() -> None:
    assert end_after(Limits(5_000, 2 * SECOND), 10, ahead=5) == 28 * SECOND


def test_nothing_is_sent_before_it_is_due() -> None:
    limits = Limits(5_000, 2 * SECOND)
    assert end_after(limits, 10, start=NOW + HOUR, last_due=NOW + HOUR) == HOUR + 18 * SECOND
    assert end_after(limits, 10, last_due=NOW + HOUR) == HOUR


def test_where_nothing_waits_there_is_no_end() -> None:
    limits = Limits(5_000, 2 * SECOND)
    assert forecast_end(limits, now=NOW, start=NOW, last_due=NOW, jobs=0) is None


def test_an_end_beyond_the_calendar_is_none() -> None:
    limits = Limits(1, timedelta(days=1))
    assert forecast_end(limits, now=NOW, start=NOW, last_due=NOW, jobs=10**7) is None
