"""Groups of waiting mail in the order of sending."""

from __future__ import annotations

import random

import pytest

from outbox_server.shared.forecast import job_groups
from outbox_server.shared.forecast.job_groups import in_order, joined
from outbox_server.shared.forecast.simulation import JobGroup, Limiter, simulate


def dues(groups: list[JobGroup]) -> list[int]:
    return [group.due + i * group.step for group in groups for i in range(group.count)]


def test_groups_that_do_not_overlap_stay_unchanged() -> None:
    groups = [JobGroup(100, 5), JobGroup(0, 3, 10, mine=3), JobGroup(50)]
    assert in_order(groups) == [groups[1], groups[2], groups[0]]


def test_groups_that_are_due_together_keep_their_order() -> None:
    groups = [JobGroup(7, 5, mine=5), JobGroup(7, 3), JobGroup(7)]
    assert in_order(groups) == groups


@pytest.mark.parametrize("seed", range(20))
def test_merging_overlapping_runs_keeps_all_mails_and_nearly_their_times(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(20):
        groups = []
        for _ in range(chance.randrange(1, 6)):
            count = chance.randrange(1, 40)
            groups.append(
                JobGroup(1_000 * chance.randrange(300), count, 1_000 * chance.randrange(12), count)
            )
        found = in_order(groups)
        assert sum(group.mine for group in found) == sum(group.count for group in groups)
        exact = sorted(dues(groups))
        near = dues(found)
        assert near == sorted(near)
        assert (len(near), near[0]) == (len(exact), exact[0])
        for one, other in zip(near, exact, strict=True):
            assert abs(one - other) <= 12_000 * len(groups)


def test_the_last_mail_of_a_batch_keeps_its_place_among_other_mail() -> None:
    # My mail is due every 10 until 990, the others every 3 until 29,997: 331 before my last one.
    groups = in_order([JobGroup(0, 100, 10, mine=100), JobGroup(0, 10_000, 3)])
    found = simulate(Limiter(10**6, 1, 10**6), groups, 0)
    assert found.sends == pytest.approx(100 + 331, abs=2)


def test_small_runs_among_very_many_are_treated_as_due_at_once() -> None:
    groups = [JobGroup(i, 2, 1_000) for i in range(2_000)] + [JobGroup(0, 50, 100, mine=50)]
    found = in_order(groups)
    assert sum(group.count for group in found) == 4_050
    assert sum(group.mine for group in found) == 50


def test_adjacent_runs_of_one_batch_with_even_spacing_are_joined() -> None:
    jobs = [
        (1, JobGroup(0, mine=1)),
        (1, JobGroup(5, mine=1)),
        (1, JobGroup(10, mine=1)),
        (2, JobGroup(15)),
        (1, JobGroup(20)),
    ]
    assert list(joined(jobs)) == [JobGroup(0, 3, 5, mine=3), JobGroup(15), JobGroup(20)]


def test_merging_very_many_groups_takes_few_steps_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def counted(group: JobGroup, count: int) -> tuple[JobGroup | None, JobGroup | None]:
        nonlocal steps
        steps += 1
        return cut(group, count)

    cut = job_groups._cut
    monkeypatch.setattr(job_groups, "_cut", counted)
    small = 20_000
    groups = [JobGroup(0, 1_000, 10**9) for _ in range(300)]
    groups += [JobGroup(n * 10**6, 1) for n in range(small)]
    assert sum(group.count for group in in_order(groups)) == 300_000 + small
    # It would be 300 for each if all long groups were cut at each small one.
    assert steps < 40 * small
