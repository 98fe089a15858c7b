from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

from outbox_server.shared.id_source import IdSource
from tests.contract_methods import contract_files

NOW_MS = 1_796_000_000_000


def at(*times_ms: int, seed: int = 1) -> IdSource:
    """Return a source whose clock shows these times, and then the last of them for ever."""
    left = list(times_ms)

    def now_ms() -> int:
        return left.pop(0) if len(left) > 1 else left[0]

    return IdSource(now_ms, random.Random(seed).getrandbits)


def always(number: int) -> Callable[[int], int]:
    return lambda _bits: number


def test_an_id_is_the_time_in_ms_and_21_random_bits() -> None:
    assert IdSource(lambda: NOW_MS, always(5)).issue() == NOW_MS * 2**21 + 5
    assert IdSource(lambda: NOW_MS, always(2**21 - 1)).issue() < (NOW_MS + 1) * 2**21


def test_the_clock_and_the_randomness_of_the_system_are_used() -> None:
    first, second = IdSource().issue(), IdSource().issue()
    assert 0 <= (second >> 21) - (first >> 21) < 60_000
    assert first >> 21 > NOW_MS - 60_000_000_000


def test_runs_never_overlap_and_increase_whatever_the_clock_does() -> None:
    times = [NOW_MS, NOW_MS, NOW_MS + 1, NOW_MS - 3_600_000, 0, NOW_MS, NOW_MS + 3_600_000]
    ids = at(*times)
    runs = [(ids.issue(count), count) for count in (5_000, 1, 5_000_000, 1, 7, 5_000, 1)]
    for (first, count), (following, _) in pairwise(runs):
        assert first + count <= following


def test_ids_are_above_those_of_sequences_and_sort_as_text_even_if_the_clock_is_wrong() -> None:
    # 2026-01-01 if the clock says 1970; the year 2100.
    ids = [at(time_ms).issue() for time_ms in (0, NOW_MS, 4_102_444_800_000)]
    assert ids == sorted(ids)
    assert {len(str(one)) for one in ids} == {19}
    assert ids[-1] < 2**63


def test_the_ids_of_consecutive_batches_have_no_constant_difference() -> None:
    ids = IdSource(lambda: NOW_MS)
    firsts = [ids.issue(10) for _ in range(10)]
    differences = {following - first for first, following in pairwise(firsts)}
    assert len(differences) > 1


def test_two_processes_that_issue_at_the_same_times_issue_different_ids() -> None:
    times = range(NOW_MS, NOW_MS + 200)
    one, other = (at(*times, seed=seed) for seed in (1, 2))
    issued = {source.issue() for source in (one, other) for _ in times}
    assert len(issued) == 2 * len(times)


def test_a_process_that_starts_again_issues_other_ids() -> None:
    before, after = at(NOW_MS, seed=1), at(NOW_MS, seed=2)
    assert before.issue() != after.issue()


def test_every_id_of_the_contract_is_a_string() -> None:
    # A JSON number above 2^53 would be rounded by JavaScript.
    found = [
        field
        for file in contract_files()
        for message in file.message_types_by_name.values()
        for field in message.fields
        if field.name.endswith(("_id", "_ids"))
    ]
    assert len(found) > 50
    assert [field.full_name for field in found if field.type != field.TYPE_STRING] == []
