from __future__ import annotations

import pytest

from shared.audit import least_gap, most_in_window, sent_twice


def test_the_least_gap_runs_from_an_end_to_the_next_start() -> None:
    assert least_gap([(0, 1), (3, 4), (9, 10)]) == 2


def test_the_order_of_the_sends_does_not_matter() -> None:
    assert least_gap([(9, 10), (0, 1), (3, 4)]) == 2


@pytest.mark.parametrize("sends", [[], [(1, 2)]])
def test_fewer_than_two_sends_have_no_gap(sends: list[tuple[int, int]]) -> None:
    assert least_gap(sends) is None


def test_sends_that_overlap_have_a_negative_gap() -> None:
    assert least_gap([(0, 5), (3, 6)]) == -2


def test_a_send_that_outlasts_several_others_counts_to_the_first_of_them() -> None:
    assert least_gap([(0, 10), (1, 2), (4, 5)]) == -9
    assert least_gap([(0, 10), (8, 9), (9, 12)]) == -2


def test_microseconds_as_ints_are_exact() -> None:
    start = 1_795_534_914_000_000
    assert least_gap([(start, start + 1), (start + 2_000_001, start + 2_000_002)]) == 2_000_000


def test_no_sends_fill_no_window() -> None:
    assert most_in_window([], 10) == 0


def test_a_window_trails_and_does_not_tumble() -> None:
    # Two on each side of a full ten: four within ten.
    assert most_in_window([8, 9, 10, 11], 10) == 4


def test_an_end_leaves_the_window_exactly_one_window_later() -> None:
    assert most_in_window([0, 10], 10) == 1
    assert most_in_window([0, 9], 10) == 2


def test_the_order_of_the_ends_does_not_matter() -> None:
    assert most_in_window([25, 1, 3, 24, 2], 10) == 3


def test_ends_at_the_same_instant_all_count() -> None:
    assert most_in_window([5, 5, 5], 10) == 3


def test_only_what_came_more_than_once_was_sent_twice() -> None:
    assert sent_twice(["<a@x>", "<b@x>", "<a@x>", "<a@x>"]) == {"<a@x>": 3}
    assert sent_twice(["<a@x>", "<b@x>"]) == {}
