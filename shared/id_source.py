"""Issues the ids of senders, batches and jobs: time and randomness instead of a sequence.

A sequence steps back when PostgreSQL fails over to a replica without the last commits, and when a
dump is restored. It then issues ids again that callers, Redis and receivers of mail already know.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

# An id has 63 bits: 42 of the Unix time in ms, which last until 2109, and 21 at random. So one
# second has 2,147,483,648 ids.
_RANDOM_BITS: Final = 21
# 2026-01-01. Even if the clock is wrong, all ids are above this, and have 19 digits. So they differ
# from the ids of the sequences that older releases use, and sort equally as text and as numbers.
_EARLIEST_MS: Final = 1_767_225_600_000
# How often ids that turn out to be in use are replaced by others, before that is an error.
ID_TRIES: Final = 5

# All ids that an IdSource issues are at least this one. Smaller ids come from a sequence.
FIRST_ISSUED_ID: Final = _EARLIEST_MS << _RANDOM_BITS
_LARGEST_ID: Final = 2**63 - 1
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# How much the clock that issued an id may differ from the clock that dated its row.
_CLOCKS_DIFFER_MS: Final = 24 * 3_600_000


def ids_of_time(created_at: datetime) -> tuple[int, int]:
    """Return the lowest and the highest id that a row of this time may have.

    It says nothing about ids from a sequence. The lowest id for a time before there were others is
    0.
    """
    ms = (created_at - _EPOCH) // timedelta(milliseconds=1)
    lowest = (ms - _CLOCKS_DIFFER_MS) << _RANDOM_BITS
    highest = max((ms + 1 + _CLOCKS_DIFFER_MS) << _RANDOM_BITS, FIRST_ISSUED_ID)
    if lowest < FIRST_ISSUED_ID:
        lowest = 0
    return min(lowest, _LARGEST_ID), min(highest, _LARGEST_ID)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class IdSource:
    """Issues increasing ids that callers cannot guess from other ids.

    Other processes may issue the same id, although this is unlikely: two that store 50,000 rows a
    second each meet once in half an hour. The primary key refuses such an id, and the caller takes
    another one.
    """

    def __init__(
        self,
        now_ms: Callable[[], int] = _now_ms,
        random_bits: Callable[[int], int] = secrets.randbits,
    ) -> None:
        """`now_ms` returns the Unix time, and `random_bits(n)` a random number of n bits."""
        self._now_ms = now_ms
        self._random_bits = random_bits
        self._last = 0

    def issue(self, count: int = 1) -> int:
        """Return the first of `count` consecutive ids, all above those issued before.

        A run of ids meets another run far less often than as many separate ids would. Its first id
        is random, so that a run says nothing about the runs of other callers.
        """
        now = max(self._now_ms(), _EARLIEST_MS) << _RANDOM_BITS
        first = max(now, self._last + 1) + self._random_bits(_RANDOM_BITS)
        self._last = first + count - 1
        return first
