from __future__ import annotations

import random

import pytest

from outbox_server.shared.audit.jobs import (
    Copies,
    JobNumbers,
    JobTrace,
    contradiction_of,
    delivery_of,
    sent_twice,
)
from outbox_server.shared.audit.replay import Replay, least_gap, most_in_window
from outbox_server.shared.states import JobState


def test_the_smallest_gap_is_measured_from_an_end_to_the_next_start() -> None:
    assert least_gap([(0, 1), (3, 4), (9, 10)]) == 2


def test_the_order_of_the_sends_does_not_matter() -> None:
    assert least_gap([(9, 10), (0, 1), (3, 4)]) == 2


@pytest.mark.parametrize("sends", [[], [(1, 2)]])
def test_fewer_than_two_sends_have_no_gap(sends: list[tuple[int, int]]) -> None:
    assert least_gap(sends) is None


def test_sends_that_overlap_have_a_negative_gap() -> None:
    assert least_gap([(0, 5), (3, 6)]) == -2


def test_the_gap_of_a_send_that_outlasts_others_is_measured_to_the_first_of_them() -> None:
    assert least_gap([(0, 10), (1, 2), (4, 5)]) == -9
    assert least_gap([(0, 10), (8, 9), (9, 12)]) == -2


def test_microseconds_as_ints_are_exact() -> None:
    start = 1_795_534_914_000_000
    assert least_gap([(start, start + 1), (start + 2_000_001, start + 2_000_002)]) == 2_000_000


def test_a_window_without_sends_is_empty() -> None:
    assert most_in_window([], 10) == 0


def test_windows_are_sliding_and_not_fixed() -> None:
    # Two sends on each side of the multiple of ten: four within ten.
    assert most_in_window([8, 9, 10, 11], 10) == 4


def test_an_end_leaves_the_window_exactly_one_window_later() -> None:
    assert most_in_window([0, 10], 10) == 1
    assert most_in_window([0, 9], 10) == 2


def test_the_order_of_the_ends_does_not_matter() -> None:
    assert most_in_window([25, 1, 3, 24, 2], 10) == 3


def test_ends_at_the_same_instant_all_count() -> None:
    assert most_in_window([5, 5, 5], 10) == 3


def test_only_mail_that_arrived_more_than_once_was_sent_twice() -> None:
    assert sent_twice(["<a@x>", "<b@x>", "<a@x>", "<a@x>"]) == {"<a@x>": 3}
    assert sent_twice(["<a@x>", "<b@x>"]) == {}


def trace(
    state: JobState,
    *,
    attempt: int = 1,
    recorded: int = 1,
    sent: int = 0,
    sent_to_smtp_side: int | None = None,
    doubtful: int = 0,
    began_after_end: bool = False,
) -> JobTrace:
    if sent_to_smtp_side is None:
        sent_to_smtp_side = sent
    return JobTrace(7, state, attempt, recorded, sent, sent_to_smtp_side, doubtful, began_after_end)


def test_a_replay_finds_the_same_as_the_complete_lists() -> None:
    chance = random.Random(1)
    for _ in range(200):
        sends = sorted(
            (
                (end - chance.uniform(0, 2), end)
                for end in (chance.uniform(0, 40) for _ in "x" * 20)
            ),
            key=lambda send: send[1],
        )
        replay = Replay(5, limit=3)
        for start, end in sends:
            replay.add(start, end)
        gap = least_gap(sends)
        assert replay.most_in_window == most_in_window((end for _, end in sends), 5)
        assert replay.overshoot() == max(0, replay.most_in_window - 3)
        assert gap is not None
        assert replay.least_gap is not None
        # If sends overlap, both gaps are negative; otherwise they are equal.
        assert (replay.least_gap == gap) or (replay.least_gap < 0 and gap < 0)


def test_sends_before_a_change_are_not_checked_but_count_in_later_windows() -> None:
    replay = Replay(10, limit=2, since=3)
    for second in (0, 1, 2):
        replay.add(second, second + 0.5)
    assert (replay.checked, replay.least_gap, replay.overshoot()) == (0, None, 0)
    replay.add(3, 3.5)
    assert (replay.sends, replay.checked, replay.least_gap, replay.overshoot()) == (4, 1, 0.5, 2)


def test_an_excess_within_the_tolerance_is_not_reported() -> None:
    replay = Replay(10, limit=1)
    replay.add(0, 1)
    replay.add(10, 10.95)
    assert replay.overshoot() == 1
    assert replay.overshoot(0.1) == 0
    assert replay.overshoot(0.01) == 1


def test_copies_are_counted_by_job_and_compared_by_message_id() -> None:
    copies = Copies(JobNumbers([1, 2, 3, 4, 9, 4_000_000_000_000_000_000]))
    for job_id, message_id in (
        (2, "<outbox.2.abc@x.test>"),
        (2, "<outbox.2.abc@x.test>"),
        (3, "<outbox.3.abc@x.test>"),
        (4, "<outbox.4.abc@x.test>"),
        (4, "<outbox.4.abc@y.test>"),
        (5, "<outbox.5.abc@x.test>"),
        (5, "<outbox.5.abc@x.test>"),
        (4_000_000_000_000_000_000, "<outbox.4000000000000000000.abc@x.test>"),
        # Accepted after PostgreSQL was read.
        (4_000_000_000_000_000_001, "<outbox.4000000000000000001.abc@x.test>"),
    ):
        copies.add(job_id, message_id)
    jobs = (1, 2, 3, 4, 5, 4_000_000_000_000_000_000, 4_000_000_000_000_000_001)
    assert [copies.of(job_id) for job_id in jobs] == [0, 2, 1, 2, 0, 1, 0]
    assert (copies.seen, copies.unknown) == (8, 1)
    assert copies.renamed == {4}


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (trace(JobState.SENT, sent=1), None),
        (trace(JobState.SENT, sent=1, doubtful=1, attempt=2, recorded=2), None),
        (trace(JobState.SENT, doubtful=1), None),
        (trace(JobState.SENT), "it is SENT, but no attempt sent it"),
        (trace(JobState.SCHEDULED, sent=1), "it was sent, but is SCHEDULED"),
        (trace(JobState.CANCELLED, sent=1), "it was sent, but is CANCELLED"),
        (trace(JobState.CANCELLED, began_after_end=True), None),
        (trace(JobState.FAILED, recorded=2), "it has attempt 2, but its attempt count is 1"),
        (trace(JobState.SENDING, attempt=2), None),
        (
            trace(JobState.SENT, sent=1, began_after_end=True),
            "an attempt began after it was SENT",
        ),
    ],
)
def test_a_job_with_contradictory_records_is_found(job: JobTrace, said: str | None) -> None:
    assert contradiction_of(job) == said


@pytest.mark.parametrize(
    ("job", "copies", "found"),
    [
        (trace(JobState.SENT, sent=1), 1, (False, 0, 0)),
        (trace(JobState.SENT, sent=1), 0, (True, 0, 0)),
        (trace(JobState.SENT, sent=1), 2, (False, 1, 1)),
        (trace(JobState.SENT, sent=1, doubtful=1), 2, (False, 1, 0)),
        (trace(JobState.SENT, sent=1, doubtful=1), 3, (False, 2, 1)),
        (trace(JobState.SENT, sent=2), 2, (False, 1, 1)),
        (trace(JobState.UNCERTAIN, doubtful=1), 0, (False, 0, 0)),
        (trace(JobState.CANCELLED), 1, (False, 0, 1)),
        (trace(JobState.SENDING), 1, (False, 0, 0)),
        (trace(JobState.SENT, sent=1), None, (False, 0, 0)),
        (trace(JobState.SENT, sent=2), None, (False, 1, 1)),
    ],
)
def test_copies_are_explained_by_sends_and_attempts_in_doubt(
    job: JobTrace, copies: int | None, found: tuple[bool, int, int]
) -> None:
    delivery = delivery_of(job, copies)
    assert (delivery.lost, delivery.duplicates, delivery.unexplained) == found


@pytest.mark.parametrize(
    ("job", "copies", "found"),
    [
        # Lost, duplicate, unexplained, elsewhere.
        (trace(JobState.SENT, sent=1, sent_to_smtp_side=0), 0, (False, 0, 0, 1)),
        (trace(JobState.SENT, sent=1, sent_to_smtp_side=0, doubtful=1), 1, (False, 1, 0, 1)),
        (trace(JobState.SENT, sent=2, sent_to_smtp_side=0), 0, (False, 1, 1, 2)),
        (trace(JobState.SENT, sent=2, sent_to_smtp_side=1), 1, (False, 1, 1, 1)),
        (trace(JobState.SENT, sent=2, sent_to_smtp_side=1), 0, (True, 0, 1, 1)),
        # The reply was a refusal, but the mail arrived.
        (trace(JobState.SENT, sent=1, sent_to_smtp_side=0), 1, (False, 0, 0, 0)),
        (trace(JobState.SENT, sent=1, sent_to_smtp_side=0), 2, (False, 1, 1, 0)),
        (trace(JobState.SENT, sent=1, sent_to_smtp_side=0), None, (False, 0, 0, 0)),
    ],
)
def test_a_send_to_a_server_that_was_not_checked_is_not_lost(
    job: JobTrace, copies: int | None, found: tuple[bool, int, int, int]
) -> None:
    delivery = delivery_of(job, copies)
    assert (
        delivery.lost,
        delivery.duplicates,
        delivery.unexplained,
        delivery.elsewhere,
    ) == found
