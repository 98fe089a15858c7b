from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from deploy.drill.plan import KINDS, Fault, plan

PROCESSES = {"dispatcher": 4, "scheduler": 2, "stats": 2}


def test_the_same_seed_gives_the_same_faults_at_the_same_times() -> None:
    faults = plan(1, 60, tuple(KINDS), PROCESSES)
    assert faults == plan(1, 60, list(reversed(tuple(KINDS))), PROCESSES)
    assert faults != plan(2, 60, tuple(KINDS), PROCESSES)
    # Written down, so that a seed in a report means the same tomorrow.
    assert plan(1, 12, ("redis_flush", "dispatcher_kill"), {}) == [
        Fault(2.0, "dispatcher_kill"),
        Fault(5.116, "redis_flush"),
        Fault(8.334, "dispatcher_kill"),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_comes_about_as_often_as_every_other(seed: int) -> None:
    counts = Counter(fault.name for fault in plan(seed, 900, tuple(KINDS), PROCESSES))
    assert set(counts) == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize("seed", range(20))
def test_no_two_faults_strike_the_same_thing_at_once(seed: int) -> None:
    ends: dict[tuple[str, int], float] = defaultdict(float)
    faults = plan(seed, 300, tuple(KINDS), PROCESSES)
    for fault in faults:
        kind = KINDS[fault.name]
        assert kind.lasts[0] <= fault.lasts <= kind.lasts[1]
        assert 1 <= fault.number <= PROCESSES.get(kind.strikes, 1)
        assert fault.at > ends[kind.strikes, fault.number]
        ends[kind.strikes, fault.number] = fault.at + fault.lasts
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    # In mixtures too: some begin while another lasts.
    assert any(a.at < b.at < a.at + a.lasts for a in faults for b in faults)


def test_a_drill_of_some_seconds_has_the_faults_that_were_asked_for() -> None:
    assert {fault.name for fault in plan(1, 12, ("redis_flush", "dispatcher_kill"), {})} == {
        "redis_flush",
        "dispatcher_kill",
    }
    assert plan(1, 60, (), PROCESSES) == []
