"""Runs of waiting mail in the order of sending."""

from __future__ import annotations

import random

import pytest

from outbox_server.shared.forecast.runs import in_order, joined
from outbox_server.shared.forecast.simulation import Limiter, Run, simulate


def dues(runs: list[Run]) -> list[int]:
    return [run.due + i * run.step for run in runs for i in range(run.count)]


def test_runs_that_do_not_overlap_stay_unchanged() -> None:
    runs = [Run(100, 5), Run(0, 3, 10, mine=3), Run(50)]
    assert in_order(runs) == [runs[1], runs[2], runs[0]]


def test_runs_that_are_due_together_keep_their_order() -> None:
    runs = [Run(7, 5, mine=5), Run(7, 3), Run(7)]
    assert in_order(runs) == runs


@pytest.mark.parametrize("seed", range(20))
def test_merging_overlapping_runs_keeps_all_mails_and_nearly_their_times(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(20):
        runs = []
        for _ in range(chance.randrange(1, 6)):
            count = chance.randrange(1, 40)
            runs.append(
                Run(1_000 * chance.randrange(300), count, 1_000 * chance.randrange(12), count)
            )
        found = in_order(runs)
        assert sum(run.mine for run in found) == sum(run.count for run in runs)
        exact = sorted(dues(runs))
        near = dues(found)
        assert near == sorted(near)
        assert (len(near), near[0]) == (len(exact), exact[0])
        for one, other in zip(near, exact, strict=True):
            assert abs(one - other) <= 12_000 * len(runs)


def test_the_last_mail_of_a_batch_keeps_its_place_among_other_mail() -> None:
    # Mine are due every 10 until 990, the others every 3 until 29,997: 331 before my last.
    runs = in_order([Run(0, 100, 10, mine=100), Run(0, 10_000, 3)])
    found = simulate(Limiter(10**6, 1, 10**6), runs, 0)
    assert found.sends == pytest.approx(100 + 331, abs=2)


def test_small_runs_among_very_many_are_treated_as_due_at_once() -> None:
    runs = [Run(i, 2, 1_000) for i in range(2_000)] + [Run(0, 50, 100, mine=50)]
    found = in_order(runs)
    assert sum(run.count for run in found) == 4_050
    assert sum(run.mine for run in found) == 50


def test_adjacent_runs_of_one_batch_with_even_spacing_are_joined() -> None:
    jobs = [
        (1, Run(0, mine=1)),
        (1, Run(5, mine=1)),
        (1, Run(10, mine=1)),
        (2, Run(15)),
        (1, Run(20)),
    ]
    assert list(joined(jobs)) == [Run(0, 3, 5, mine=3), Run(15), Run(20)]
