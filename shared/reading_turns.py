"""Lets one thread at a time read rows, in turns between users.

All threads of a process share one interpreter, which the event loop needs for each of its steps.
The more threads compute, the longer it waits for each step, and they are no faster together. So
one thread computes at a time. It passes its turn on after some rows, and gives it back while it
waits for something, such as the caller's data. While other users call, it rests after some rows for
REST_RATIO times as long as it took to read them, unless others read as well.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from outbox_server.shared.fair_shares import Claimant
from outbox_server.shared.turns import REST_RATIO

# The longest rest after some rows, in seconds.
_LONGEST_REST_S: Final = 0.015


class ReadingTurns:
    """The threads of one process that read rows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        # The threads that wait, by user. The users take turns.
        self._lines: dict[Claimant, deque[threading.Event]] = {}

    @property
    def waiting(self) -> int:
        """How many threads wait."""
        with self._lock:
            return sum(map(len, self._lines.values()))

    @contextmanager
    def taken(
        self, owner: Claimant, others_call: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """Have the turn in this thread until the end of the block, for the work of a user."""
        turn = _CURRENT.turn = _Turn(self, owner, others_call)
        turn.take()
        try:
            yield
        finally:
            del _CURRENT.turn
            turn.give()

    def take(self, owner: Claimant) -> None:
        """Wait for the turn."""
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Event()
            self._lines.setdefault(owner, deque()).append(mine)
        mine.wait()

    def give(self) -> None:
        """Give the turn to the next thread, if one waits."""
        with self._lock:
            if not self._lines:
                self._taken = False
                return
            owner = next(iter(self._lines))
            line = self._lines.pop(owner)
            following = line.popleft()
            if line:
                self._lines[owner] = line
        following.set()

    def others_wait(self, owner: Claimant) -> bool:
        """Return whether a thread of another user waits."""
        with self._lock:
            return any(each != owner for each in self._lines)


class _Turn:
    """The turn of a thread."""

    __slots__ = ("_began", "_others_call", "_owner", "_turns")

    def __init__(
        self, turns: ReadingTurns, owner: Claimant, others_call: Callable[[], bool]
    ) -> None:
        self._turns = turns
        self._owner = owner
        self._others_call = others_call
        self._began = 0.0

    def take(self) -> None:
        self._turns.take(self._owner)
        self._began = time.monotonic()

    def give(self) -> None:
        self._turns.give()

    def pass_on(self) -> None:
        if self._others_call() and not self._turns.others_wait(self._owner):
            # Their calls need the interpreter. The turn is kept, for the user's other threads.
            time.sleep(min(REST_RATIO * (time.monotonic() - self._began), _LONGEST_REST_S))
        self.give()
        self.take()


class _Current(threading.local):
    """The turn of the current thread."""

    turn: _Turn | None = None


_CURRENT: Final = _Current()


def pass_on() -> None:
    """Let other threads go first, if the current one has the turn."""
    if _CURRENT.turn is not None:
        _CURRENT.turn.pass_on()


@contextmanager
def given_back() -> Iterator[None]:
    """Give the turn back while the current thread waits for something. It may have none."""
    turn = _CURRENT.turn
    if turn is None:
        yield
        return
    turn.give()
    try:
        yield
    finally:
        turn.take()
