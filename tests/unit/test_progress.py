"""Counters and rates, on a clock that the test sets."""

from __future__ import annotations

import pytest

from outbox_server.services.dispatcher.progress import Progress
from tests.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock(1_000.25)


@pytest.fixture
def progress(clock: Clock) -> Progress:
    return Progress(clock)


def test_progress_is_zero_at_first(progress: Progress) -> None:
    assert progress.rates() == (0.0, 0.0)
    assert (progress.attempt_count, progress.sent_count, progress.uptime) == (0, 0, 0.0)


def test_attempts_and_sent_mails_are_counted_separately(progress: Progress) -> None:
    for sent in (True, False, True):
        progress.count(sent=sent)

    assert (progress.attempt_count, progress.sent_count) == (3, 2)


def test_the_rates_of_a_young_process_are_measured_since_its_start(
    progress: Progress, clock: Clock
) -> None:
    clock.now += 9
    for sent in (True, False) * 10:
        progress.count(sent=sent)
    clock.now += 1

    assert progress.uptime == 10
    assert progress.rates() == (2.0, 1.0)


def test_rates_in_the_first_second_are_not_inflated(progress: Progress, clock: Clock) -> None:
    clock.now += 0.001
    progress.count(sent=True)

    assert progress.rates() == (1.0, 1.0)


def test_rates_cover_the_last_minute(progress: Progress, clock: Clock) -> None:
    for _ in range(600):
        progress.count(sent=True)
    clock.now += 100
    for _ in range(30):
        clock.now += 1
        progress.count(sent=False)

    assert progress.rates() == (0.5, 0.0)
    assert (progress.attempt_count, progress.sent_count) == (630, 600)


def test_rates_fall_after_the_last_send(progress: Progress, clock: Clock) -> None:
    progress.count(sent=True)
    clock.now += 61

    assert progress.rates() == (0.0, 0.0)


def test_memory_does_not_grow_with_the_number_of_attempts(progress: Progress, clock: Clock) -> None:
    for _ in range(5_000):
        clock.now += 0.5
        progress.count(sent=True)

    assert len(progress._seconds) <= 61
    assert progress.rates() == pytest.approx((2.0, 2.0), rel=0.05)
