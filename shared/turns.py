"""Lets the calls of a user run in turns, and long work in parts, so that no user slows another.

All calls of a server share one event loop. At each of its waits, a call lets one step of every
other running call go first. So many calls of one user, however cheap, would make each call of
another user slow, although places are free. Therefore:

- Few calls of a user run at a time: ALONE, or AT_ONCE while others call as well. The rest wait.
- The calls of a user with many calls in progress, and each part of long work, give way to the
  calls of users with few. They wait for them for at most `_GIVES_WAY_S`, so nobody can stop them.
- While calls arrive one after the other, those of a user with many wait in the same manner: a call
  of another user may be among them.

A user with few calls thus waits for the call that runs, or for one part, of a user with many.

A call that has run for a while does not count any more: it spends its time waiting, for PostgreSQL
or for its caller. Calls of operators and of services are not held up, and no user is slower because
an operator calls. Nothing is stored about a user without calls.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from outbox_server.shared.fair_shares import Claimant
from outbox_server.shared.recent_callers import RecentCallers

# How many calls of a user run at once while others call. With two, a call of another user took up
# to five times as long during a flood.
AT_ONCE: Final = 1
# How many run at once while nobody else calls. More would not be faster, because the event loop is
# busy with these, and the first call of another user would have to wait for each of them.
ALONE: Final = 8
# A user with more calls in progress has many.
_FEW: Final = 4
# For how long a running call counts, in seconds.
_COUNTS_S: Final = 0.05
# For how long a call or a part gives way, in seconds. Most calls take less. If calls of others run
# all the time, the calls of a user with many give way for half of the time.
_GIVES_WAY_S: Final = 0.01
# For how long after the arrival of a call the next one may follow, in seconds. gRPC hands calls
# over one by one, so a call of another user may come after all those that it arrived with.
_ARRIVES_S: Final = 0.001
# While others call, long work rests after each part for this many times as long as the part took:
# it takes a quarter of the time. With a ratio of 1, calls took up to three times as long beside it.
REST_RATIO: Final = 3
# The longest rest after a part, in seconds.
_LONGEST_REST_S: Final = 0.03
_KIND: Final = "user"


class Turns:
    """The running calls of all users of a server."""

    def __init__(self, at_once: int = AT_ONCE, alone: int = ALONE) -> None:
        self._at_once = at_once
        self._alone = alone
        self._users: dict[Claimant, _CallsOfUser] = {}
        # The running calls of users with few calls that did not have to wait, with the times when
        # they began, the oldest first.
        self._prompt: dict[Turn, float] = {}
        # Parts that give way to them.
        self._giving_way: set[asyncio.Future[None]] = set()
        # The users whose next call gives way to them.
        self._behind: dict[Claimant, None] = {}
        # The parts of each user that wait or give way: one at a time.
        self._parts: dict[Claimant, deque[asyncio.Future[None]]] = {}
        self._callers = RecentCallers()
        # When the last call of a user arrived.
        self._arrived = 0.0

    @property
    def waiting(self) -> int:
        """How many calls wait."""
        return sum(len(calls.waiting) for calls in self._users.values())

    def note_arrival(self, claimant: Claimant) -> None:
        """Note that a call of a user has arrived. It may still be refused."""
        if _is_limited(claimant):
            self._arrived = asyncio.get_running_loop().time()

    @asynccontextmanager
    async def entered(self, claimant: Claimant) -> AsyncIterator[Turn]:
        """Wait until a call may run, and count it until the end of the block."""
        turn = Turn(self, claimant)
        try:
            await turn.take()
            yield turn
        finally:
            turn.leave()

    async def next_part(self, claimant: Claimant) -> None:
        """Wait until the next part of long work of a user may run.

        A part is what runs until the next wait: 1 or 2 ms. Parts of one user run one by one. While
        others call, there is a rest after each part, REST_RATIO times as long as the part.
        """
        loop = asyncio.get_running_loop()
        if not _is_limited(claimant) or not self._callers.others_call(claimant, loop.time()):
            await asyncio.sleep(0)
            return
        line = self._parts.get(claimant)
        if line is None:
            line = self._parts[claimant] = deque()
        own: asyncio.Future[None] = loop.create_future()
        line.append(own)
        try:
            if line[0] is not own:
                await own
            await self._give_way(claimant)
        except BaseException:
            self._end_part(claimant, own)
            raise
        # It begins now, and has ended when the event loop runs the next step.
        loop.call_soon(self._rest, claimant, own, loop.time())

    def _rest(self, claimant: Claimant, part: asyncio.Future[None], began: float) -> None:
        loop = asyncio.get_running_loop()
        rest = min(REST_RATIO * (loop.time() - began), _LONGEST_REST_S)
        loop.call_later(rest, self._end_part, claimant, part)

    def _end_part(self, claimant: Claimant, part: asyncio.Future[None]) -> None:
        """Let the next part of a user run."""
        line = self._parts[claimant]
        line.remove(part)
        if line:
            _wake(line[0])
        else:
            del self._parts[claimant]

    async def _give_way(self, claimant: Claimant) -> None:
        """Wait for prompt calls of others; at least for one step of each call that is ready."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)
        end = loop.time() + _GIVES_WAY_S
        while (until := self._prompt_until(claimant, loop.time())) is not None:
            until = min(until, end)
            if until <= loop.time():
                return
            woken: asyncio.Future[None] = loop.create_future()
            self._giving_way.add(woken)
            timer = loop.call_at(until, _wake, woken)
            try:
                await woken
            finally:
                timer.cancel()
                self._giving_way.discard(woken)

    def _prompt_until(self, claimant: Claimant, now: float) -> float | None:
        """Return until when prompt calls of others count; None if none run."""
        while self._prompt:
            turn, began = next(iter(self._prompt.items()))
            if began + _COUNTS_S > now:
                break
            del self._prompt[turn]
        for turn, began in reversed(self._prompt.items()):
            if turn.claimant != claimant:
                return began + _COUNTS_S
        return None

    def _others_until(self, claimant: Claimant, now: float) -> float | None:
        """Return until when prompt calls of others count, also those that may arrive now."""
        until = self._prompt_until(claimant, now)
        arriving = self._arrived + _ARRIVES_S
        if arriving <= now or not self._callers.others_call(claimant, now):
            return until
        return arriving if until is None else max(until, arriving)

    def begin(self, turn: Turn) -> asyncio.Future[None] | None:
        """Begin a call, or return the future that says when it may run."""
        claimant = turn.claimant
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._callers.note(claimant, now)
        if not _is_limited(claimant):
            return None
        calls = self._users.get(claimant)
        if calls is None:
            calls = self._users[claimant] = _CallsOfUser()
        calls.in_progress.add(turn)
        if not calls.waiting and self._has_room(claimant, calls, now):
            few = len(calls.in_progress) <= _FEW
            if few:
                self._prompt.pop(turn, None)
                self._prompt[turn] = now
            if few or self._others_until(claimant, now) is None:
                calls.running[turn] = now
                return None
        future: asyncio.Future[None] = loop.create_future()
        calls.waiting.append((turn, future))
        if calls.timer is None:
            self._serve(claimant)
        return future

    def end(self, turn: Turn, *, pausing: bool = False) -> None:
        """End a call, or its wait, or its turn if it is `pausing`. May be called again."""
        calls = self._users.get(turn.claimant)
        if calls is not None:
            if not pausing:
                calls.in_progress.discard(turn)
            calls.running.pop(turn, None)
            self._serve(turn.claimant)
        # Others still give way to a call that pauses: each of its waits would be longer otherwise.
        if not pausing and self._prompt.pop(turn, None) is not None:
            for woken in self._giving_way:
                _wake(woken)
            for claimant in list(self._behind):
                self._serve(claimant)

    def _serve(self, claimant: Claimant) -> None:
        """Let those calls of a user go on that may, and forget a user without calls."""
        calls = self._users.get(claimant)
        if calls is None:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._behind.pop(claimant, None)
        until = None
        while calls.waiting and self._has_room(claimant, calls, now):
            turn, future = calls.waiting[0]
            if not future.done():  # its call was not cancelled
                until = self._waits_until(claimant, calls, now)
                if until is not None:
                    self._behind[claimant] = None
                    break
                calls.running[turn] = now
                future.set_result(None)
            calls.waiting.popleft()
        if calls.timer is not None:
            calls.timer.cancel()
            calls.timer = None
        if calls.waiting:
            if until is None:
                until = next(iter(calls.running.values())) + _COUNTS_S
            calls.timer = loop.call_at(until, self._serve, claimant)
        elif not calls.in_progress:
            del self._users[claimant]

    def _waits_until(self, claimant: Claimant, calls: _CallsOfUser, now: float) -> float | None:
        """Return until when the next call of a user gives way at most; None if it does not."""
        until = self._others_until(claimant, now)
        if until is None:
            calls.gives_way_from = None
            return None
        began = calls.gives_way_from
        if began is None or now - began >= 2 * _GIVES_WAY_S:
            began = calls.gives_way_from = now
        end = began + _GIVES_WAY_S
        return min(until, end) if now < end else None

    def _has_room(self, claimant: Claimant, calls: _CallsOfUser, now: float) -> bool:
        """Return whether one more call of a user may run at a time."""
        if len(calls.running) < self._at_once:
            return True
        # The oldest ones come first.
        while calls.running:
            oldest = next(iter(calls.running))
            if now - calls.running[oldest] < _COUNTS_S:
                break
            del calls.running[oldest]
        most = self._at_once if self._callers.others_call(claimant, now) else self._alone
        return len(calls.running) < most

    def others_call(self, claimant: Claimant) -> bool:
        """Return whether another claimant has called within the last seconds. For any thread."""
        return self._callers.others_call(claimant, time.monotonic())


class Turn:
    """The turn of one call."""

    __slots__ = ("_turns", "claimant")

    def __init__(self, turns: Turns, claimant: Claimant) -> None:
        self._turns = turns
        self.claimant = claimant

    @property
    def is_limited(self) -> bool:
        """Whether the call may have to wait."""
        return _is_limited(self.claimant)

    async def take(self) -> None:
        """Wait until the call may run. It may have had a turn before."""
        future = self._turns.begin(self)
        if future is None:
            return
        try:
            await future
        except asyncio.CancelledError:
            self.leave()
            raise

    def pause(self) -> None:
        """Let another call run, until `take`."""
        self._turns.end(self, pausing=True)

    def leave(self) -> None:
        """Let another call run, and do not count any more. May be called again."""
        self._turns.end(self)

    def others_call(self) -> bool:
        """Return whether others call as well. For any thread."""
        return self._turns.others_call(self.claimant)

    async def next_part(self) -> None:
        """Let others run before the next part of the call's long work (see `Turns.next_part`)."""
        await self._turns.next_part(self.claimant)


class _CallsOfUser:
    """The calls of one user."""

    __slots__ = ("gives_way_from", "in_progress", "running", "timer", "waiting")

    def __init__(self) -> None:
        self.in_progress: set[Turn] = set()
        # When each of them began, the oldest first. Those that do not count any more are missing.
        self.running: dict[Turn, float] = {}
        self.waiting: deque[tuple[Turn, asyncio.Future[None]]] = deque()
        # Since when the calls give way to others. After `_GIVES_WAY_S`, they do not for as long.
        self.gives_way_from: float | None = None
        self.timer: asyncio.TimerHandle | None = None


def _is_limited(claimant: Claimant) -> bool:
    return claimant.kind == _KIND and not claimant.privileged


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
