"""Counts the batches that were read ahead and are not used yet, so that they stay few. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Their size together, in characters: a quarter of what the composer keeps.
MOST_PREPARED: Final = 16 * 1024 * 1024
# A batch that nobody uses for so long (seconds) is forgotten: another dispatcher sent the mail, or
# a pause holds it.
_KEPT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Prepared:
    user: str
    size: int
    at: float


class PreparedBatches:
    """Shares the room for prepared batches among users.

    While there is room, any user may have all of it. Then the user who has the most gives way to
    others. Times are seconds of any clock.
    """

    def __init__(self, most: int = MOST_PREPARED) -> None:
        self._most = most
        self._size = 0
        # The oldest first.
        self._batches: dict[int, _Prepared] = {}
        self._of_users: dict[str, dict[int, int]] = {}
        self._sizes: dict[str, int] = {}

    def has_room(self, user: str) -> bool:
        """Return whether a batch of a user may be prepared."""
        return self._size < self._most or user != self._largest()

    def add(self, batch_id: int, user: str, size: int, now: float) -> list[int]:
        """Count a batch, and return those that are to be forgotten for it."""
        self.use(batch_id)
        self._batches[batch_id] = _Prepared(user, size, now)
        self._of_users.setdefault(user, {})[batch_id] = size
        self._sizes[user] = self._sizes.get(user, 0) + size
        self._size += size
        forgotten = []
        while self._size > self._most:
            # Its last one, which is due last.
            last = next(reversed(self._of_users[self._largest()]))
            self.use(last)
            forgotten.append(last)
        return forgotten

    def use(self, batch_id: int) -> None:
        """Count a batch no more: its mail is being sent, or it is forgotten."""
        found = self._batches.pop(batch_id, None)
        if found is None:
            return
        self._size -= found.size
        self._sizes[found.user] -= found.size
        of_user = self._of_users[found.user]
        del of_user[batch_id]
        if not of_user:
            del self._of_users[found.user], self._sizes[found.user]

    def expire(self, now: float) -> list[int]:
        """Return the batches that are to be forgotten because nobody has used them for long."""
        expired = []
        for batch_id, each in self._batches.items():
            if now - each.at < _KEPT_S:
                break
            expired.append(batch_id)
        for batch_id in expired:
            self.use(batch_id)
        return expired

    def _largest(self) -> str:
        return max(self._sizes, key=self._sizes.__getitem__, default="")
