"""Counters and rates, on a clock that the test sets."""

from __future__ import annotations

import pytest

from outbox_server.services.dispatcher.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.25

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock: Clock) -> Progress:
    return Progress(clock)


def test_nothing_happened_yet(progress: Progress) -> None:
    assert progress.rates() == (0.0, 0.0)
    assert (progress.attempt_count, progress.sent_count, progress.uptime) == (0, 0, 0.0)


def test_attempts_and_mails_sent_are_counted_apart(progress: Progress) -> None:
    for sent in (True, False, True):
        progress.count(sent=sent)

    assert (progress.attempt_count, progress.sent_count) == (3, 2)


def test_a_young_process_is_measured_since_its_start(progress: Progress, clock: Clock) -> None:
    clock.now += 9
    for sent in (True, False) * 10:
        progress.count(sent=sent)
    clock.now += 1

    assert progress.uptime == 10
    assert progress.rates() == (2.0, 1.0)


def test_the_first_second_is_no_division_by_almost_nothing(
    progress: Progress, clock: Clock
) -> None:
    clock.now += 0.001
    progress.count(sent=True)

    assert progress.rates() == (1.0, 1.0)


def test_rates_are_of_the_last_minute(progress: Progress, clock: Clock) -> None:
    for _ in range(600):
        progress.count(sent=True)
    clock.now += 100
    for _ in range(30):
        clock.now += 1
        progress.count(sent=False)

    assert progress.rates() == (0.5, 0.0)
    assert (progress.attempt_count, progress.sent_count) == (630, 600)


def test_rates_fade_when_nothing_is_sent_any_more(progress: Progress, clock: Clock) -> None:
    progress.count(sent=True)
    clock.now += 61

    assert progress.rates() == (0.0, 0.0)


def test_memory_does_not_follow_the_number_of_attempts(progress: Progress, clock: Clock) -> None:
    for _ in range(5_000):
        clock.now += 0.5
        progress.count(sent=True)

    assert len(progress._seconds) <= 61
    assert progress.rates() == pytest.approx((2.0, 2.0), rel=0.05)
