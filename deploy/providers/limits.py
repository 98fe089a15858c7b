"""The arithmetic of a provider's limits. Pure: callers pass the time, in seconds of any clock."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# The maximum number of accounts, triplets or mailboxes that are remembered at once.
MOST_KEYS: Final = 100_000


class SlidingWindow:
    """Counts the events of the last `seconds`. It is full when there are `most` of them."""

    def __init__(self, most: int, seconds: float) -> None:
        self.most = most
        self._seconds = seconds
        # Never longer than `most`.
        self._times: deque[float] = deque()

    def used(self, now: float) -> int:
        """Return the number of events in the last `seconds`."""
        while self._times and self._times[0] + self._seconds <= now:
            self._times.popleft()
        return len(self._times)

    def full(self, now: float) -> bool:
        """Return whether one more event would be too many."""
        return self.used(now) >= self.most

    def add(self, now: float) -> None:
        """Count an event; the window must not be full."""
        self._times.append(now)


class Bounded(Generic[K, V]):
    """A mapping of bounded size. The key that was added first is removed first."""

    def __init__(self, make: Callable[[], V], most: int = MOST_KEYS) -> None:
        self._make = make
        self._most = most
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V:
        """Return the value of a key; create it if there is none."""
        if key not in self._values:
            self._values[key] = self._make()
            if len(self._values) > self._most:
                self._values.popitem(last=False)
        return self._values[key]


class FirstSeen(Generic[K]):
    """Remembers when each key was first seen."""

    def __init__(self, most: int = MOST_KEYS) -> None:
        self._first: Bounded[K, list[float]] = Bounded(list, most)

    def age(self, key: K, now: float) -> float:
        """Return the seconds since a key was first seen; 0 if that is now."""
        first = self._first.get(key)
        if not first:
            first.append(now)
        return now - first[0]
