"""Which limit of a sender binds."""

from __future__ import annotations

from datetime import timedelta

import pytest

from outbox_server.services.scheduler.limits import Limits
from outbox_server.shared.gap import effective_gap

SECOND = timedelta(seconds=1)


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
def test_the_smaller_of_limit_and_hour_divided_by_gap_binds(
    hourly_limit: int, gap_s: int, effective: int, *, gap_binds: bool
) -> None:
    limits = Limits(hourly_limit, gap_s * SECOND)
    assert (limits.effective_hourly_limit, limits.gap_binds) == (effective, gap_binds)
    assert bool(limits.notice()) == gap_binds


@pytest.mark.parametrize(
    ("min_gap_ms", "floor_s", "gap_s"), [(None, 2, 2), (3_000, 2, 3), (1_000, 2, 2), (0, 0, 0)]
)
def test_the_floor_applies_to_senders_created_before_it(
    min_gap_ms: int | None, floor_s: int, gap_s: int
) -> None:
    assert effective_gap(min_gap_ms, floor_s * SECOND) == gap_s * SECOND
