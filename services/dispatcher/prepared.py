"""Limits the memory of batches that were read ahead and are not used yet. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

# The size of all of them together, in characters: a quarter of what the composer keeps.
MOST_PREPARED: Final = 16 * 1024 * 1024
# A batch that is not used for this many seconds is forgotten: another dispatcher sent its mail, or
# a pause delays it.
_KEPT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Prepared:
    user: str
    size: int
    at: float


class PreparedBatches:
    """Shares the room for prepared batches among users.

    While there is room, any user may take it. When it is full, the users who have the most of it
    give way to others. Times are seconds of any clock.
    """

    def __init__(self, forget: Callable[[int], object], most: int = MOST_PREPARED) -> None:
        """`forget` is called for a batch that gives way, or that was not used for long."""
        self._forget = forget
        self._most = most
        self._size = 0
        # The oldest first.
        self._batches: dict[int, _Prepared] = {}
        self._of_users: dict[str, dict[int, None]] = {}
        self._sizes: dict[str, int] = {}

    def __contains__(self, batch_id: int) -> bool:
        """Whether a batch was added, and is neither used nor forgotten."""
        return batch_id in self._batches

    def add(self, batch_id: int, user: str, size: int, now: float) -> bool:
        """Count a batch, or change its size. Return False if there is no room for it."""
        self.use(batch_id)
        while self._size + size > self._most:
            largest = max(self._sizes, key=self._sizes.__getitem__, default="")
            if self._sizes.get(user, 0) + size >= self._sizes.get(largest, 0):
                return False
            # The last batch of that user, which is due last.
            last = next(reversed(self._of_users[largest]))
            self.use(last)
            self._forget(last)
        self._batches[batch_id] = _Prepared(user, size, now)
        self._of_users.setdefault(user, {})[batch_id] = None
        self._sizes[user] = self._sizes.get(user, 0) + size
        self._size += size
        return True

    def use(self, batch_id: int) -> None:
        """Stop counting a batch: its mail is being sent, or it is forgotten."""
        found = self._batches.pop(batch_id, None)
        if found is None:
            return
        self._size -= found.size
        self._sizes[found.user] -= found.size
        of_user = self._of_users[found.user]
        del of_user[batch_id]
        if not of_user:
            del self._of_users[found.user], self._sizes[found.user]

    def expire(self, now: float) -> None:
        """Forget the batches that nobody has used for long."""
        for batch_id, each in list(self._batches.items()):
            if now - each.at < _KEPT_S:
                break
            self.use(batch_id)
            self._forget(batch_id)
