"""Decides which waiting calls form the next group of small batches.

Claimants take turns. Those with many waiting calls have groups of their own, which are written at
the same time as the groups of all others. So nobody else waits behind them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, Generic, Protocol, TypeVar

from outbox_server.shared.fair_shares import Claimant
from outbox_server.shared.recent_callers import RecentCallers

# The maximum number of batches and rows of a group, so that its transaction is short.
_MOST_BATCHES: Final = 64
_MOST_ROWS: Final = 1_000
# A claimant with more waiting calls than this has many.
_FEW: Final = 4
# The maximum number of batches and rows of a group of claimants with many waiting calls, while
# others call as well or did within the last seconds. All groups share the event loop and
# PostgreSQL.
_MOST_BESIDE_OTHERS: Final = 16
_MOST_ROWS_BESIDE_OTHERS: Final = 200


class QueuedCall(Protocol):
    """A call that waits for its group."""

    @property
    def claimant(self) -> Claimant:
        """The caller."""

    @property
    def request_id(self) -> str:
        """The id of the request. A group has no two calls with the same one."""

    @property
    def row_count(self) -> int:
        """How many rows the batch has."""

    @property
    def has_left(self) -> bool:
        """Whether nobody waits for the result any more."""


C = TypeVar("C", bound=QueuedCall)


class GroupQueue(Generic[C]):
    """The calls that wait. A group is one of claimants with `many` waiting calls, or of others."""

    def __init__(self) -> None:
        self._lines: dict[Claimant, deque[C]] = {}
        # The claimants of the groups that are being written. None of them has two groups at a time,
        # which would wait for the same locks.
        self._written: dict[bool, frozenset[Claimant]] = {}
        self._callers = RecentCallers()

    def add(self, call: C, now: float) -> None:
        """Let a call wait. `now` is the time of the event loop."""
        self._callers.note(call.claimant, now)
        self._lines.setdefault(call.claimant, deque()).append(call)

    def has_group(self, *, many: bool) -> bool:
        """Return whether a group of this kind can be formed now."""
        return bool(self._able(many=many))

    def next_group(self, now: float, *, many: bool) -> list[C]:
        """Take the calls of the next group. Its claimants get no other group before `end_group`."""
        most, most_rows = _MOST_BATCHES, _MOST_ROWS
        if many and self.several_call(now):
            most, most_rows = _MOST_BESIDE_OTHERS, _MOST_ROWS_BESIDE_OTHERS
        lines = {claimant: self._lines.pop(claimant) for claimant in self._able(many=many)}
        group: list[C] = []
        # The second call with one request_id needs the first one's batch.
        requests: set[str] = set()
        rows = 0
        later: list[C] = []
        while lines and len(group) < most and rows < most_rows:
            claimant = next(iter(lines))
            line = lines.pop(claimant)
            each = line.popleft()
            if line:
                lines[claimant] = line
            if each.has_left:
                continue
            if each.request_id in requests:
                later.append(each)
                continue
            requests.add(each.request_id)
            group.append(each)
            rows += each.row_count
        # Those who have a group come after all others.
        self._lines |= lines
        self.put_back(later)
        self._written[many] = frozenset(each.claimant for each in group)
        return group

    def several_call(self, now: float) -> bool:
        """Return whether several claimants call, or did within the last seconds."""
        return self._callers.several_call(now)

    def end_group(self, *, many: bool) -> None:
        """Let the claimants of the last group of this kind have another one."""
        self._written.pop(many, None)

    def put_back(self, calls: Sequence[C]) -> None:
        """Let calls wait for the next group, before all others."""
        lines: dict[Claimant, deque[C]] = {each.claimant: deque() for each in calls}
        for claimant, line in self._lines.items():
            lines.setdefault(claimant, deque()).extend(line)
        for each in reversed(calls):
            lines[each.claimant].appendleft(each)
        self._lines = lines

    def take_all(self) -> list[C]:
        """Take all calls."""
        calls = [each for line in self._lines.values() for each in line]
        self._lines.clear()
        return calls

    def _able(self, *, many: bool) -> list[Claimant]:
        busy = self._written.get(not many, ())
        return [
            claimant
            for claimant, line in self._lines.items()
            if (len(line) > _FEW) == many and claimant not in busy
        ]
