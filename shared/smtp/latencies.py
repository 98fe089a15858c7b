"""Buckets of latencies, each 19 % wider than the one before, and quantiles of them. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

# From 1 ms to 17 min. Shorter latencies are in the first bucket, longer ones in the last.
BUCKETS: Final = 80
_PER_DOUBLING: Final = 4


def bucket_of(seconds: float) -> int:
    """Return the bucket of a latency."""
    milliseconds = max(seconds * 1000, 1.0)
    return min(math.ceil(math.log2(milliseconds) * _PER_DOUBLING), BUCKETS - 1)


def quantile(counts: Sequence[int], part: float) -> timedelta | None:
    """Return the upper end of the bucket with a quantile, such as 0.99; None without counts."""
    wanted = math.ceil(sum(counts) * part)
    if not wanted:
        return None
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if seen >= wanted:
            return timedelta(milliseconds=2 ** (bucket / _PER_DOUBLING))
    return None
