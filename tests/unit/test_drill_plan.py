from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import pytest

from outbox_server.deploy.drill.plan import (
    CARDS,
    KINDS,
    OPERATIONS,
    OUTAGE_DRILL_S,
    OUTAGES,
    ROLLOUTS,
    STORES,
    Fault,
    plan,
)
from tests.for_each import for_each

PROCESSES = {"dispatcher": 4, "scheduler": 2, "stats": 2}


def test_the_same_seed_gives_the_same_faults_at_the_same_times() -> None:
    faults = plan(1, 60, tuple(KINDS), PROCESSES)
    assert faults == plan(1, 60, list(reversed(tuple(KINDS))), PROCESSES)
    assert faults != plan(2, 60, tuple(KINDS), PROCESSES)
    # A fixed plan, so that the seed of an old report still gives the same faults.
    assert plan(1, 12, ("redis_flush", "dispatcher_kill"), {}) == [
        Fault(2.0, "dispatcher_kill"),
        Fault(5.116, "redis_flush"),
        Fault(8.334, "dispatcher_kill"),
    ]
    assert plan(1, 8, ("smtp_stall", "redis_clock"), {}) == [
        Fault(2.0, "redis_clock", 0.913, 1, "2s"),
        Fault(5.116, "smtp_stall", 3.373, 1, "auth"),
    ]


@for_each(range(20))
def test_all_kinds_of_fault_occur_about_equally_often(seed: int) -> None:
    faults = plan(seed, 900, tuple(KINDS), PROCESSES)
    for kinds in (CARDS, OUTAGES):
        counts = Counter(fault.name for fault in faults if fault.name in kinds)
        assert set(counts) == set(kinds)
        assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.variants])
def test_every_variant_of_a_kind_occurs_in_a_long_drill(name: str) -> None:
    several = plan(1, 900, (name,), PROCESSES)
    assert {fault.variant for fault in several} == set(KINDS[name].variants)


@for_each(range(20))
def test_a_long_enough_drill_has_one_outage_at_a_time(seed: int) -> None:
    names = tuple(OUTAGES)
    assert plan(seed, 60, names, PROCESSES) == []
    assert plan(seed, OUTAGE_DRILL_S, names, PROCESSES)
    outages = plan(seed, 900, names, PROCESSES)
    for one, following in itertools.pairwise(outages):
        # With time for recovery between them.
        assert following.at >= one.at + one.lasts + 30
    last = outages[-1]
    assert last.at + last.lasts <= 880


@for_each(range(20))
def test_no_two_faults_hit_the_same_target_at_once(seed: int) -> None:
    ends: dict[tuple[str, int], float] = defaultdict(float)
    faults = plan(seed, 300, tuple(KINDS), PROCESSES)
    for fault in faults:
        kind = KINDS[fault.name]
        assert kind.lasts[0] <= fault.lasts <= kind.lasts[1]
        assert 1 <= fault.number <= PROCESSES.get(kind.strikes, 1)
        assert fault.at > ends[kind.strikes, fault.number]
        ends[kind.strikes, fault.number] = fault.at + fault.lasts
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    # In mixtures, some faults begin while another lasts.
    assert any(a.at < b.at < a.at + a.lasts for a in faults for b in faults)


def test_a_drill_of_a_few_seconds_has_the_requested_faults() -> None:
    assert {fault.name for fault in plan(1, 12, ("redis_flush", "dispatcher_kill"), {})} == {
        "redis_flush",
        "dispatcher_kill",
    }
    assert plan(1, 60, (), PROCESSES) == []


@for_each(range(20))
def test_a_drill_has_rolling_restarts_from_its_start_on(seed: int) -> None:
    names = tuple(ROLLOUTS)
    for minutes, least in ((0.2, 1), (1, 1), (10, 5)):
        found = plan(seed, minutes * 60, names, PROCESSES)
        assert len(found) >= least
        assert found[0].at < 5
        # Time for the replacement of all processes.
        assert all(fault.at <= minutes * 60 - 60 for fault in found[1:])
    # They change nothing of the other faults.
    with_rollouts = plan(seed, 300, tuple(KINDS), PROCESSES)
    others = plan(seed, 300, (*CARDS, *OUTAGES), PROCESSES)
    planned = {*ROLLOUTS, *STORES, *OPERATIONS}
    assert [fault for fault in with_rollouts if fault.name not in planned] == others


@for_each(range(20))
def test_faults_of_the_stores_come_one_by_one_and_equally_often(seed: int) -> None:
    found = plan(seed, 600, tuple(STORES), PROCESSES)
    counts = Counter(fault.name for fault in found)
    assert set(counts) == set(STORES)
    assert max(counts.values()) - min(counts.values()) <= 1
    # A node that was killed is back before the next fault.
    assert all(later.at - fault.at >= 14 for fault, later in itertools.pairwise(found))


@for_each(range(20))
def test_operations_come_one_by_one_and_leave_time_for_their_effect(seed: int) -> None:
    assert plan(seed, 60, tuple(OPERATIONS), PROCESSES)
    found = plan(seed, 600, tuple(OPERATIONS), PROCESSES)
    wanted = {(name, way) for name, kind in OPERATIONS.items() for way in kind.variants or ("",)}
    assert {(fault.name, fault.variant) for fault in found} == wanted
    assert all(later.at >= one.at + one.lasts + 10 for one, later in itertools.pairwise(found))
    assert found[-1].at <= 580
