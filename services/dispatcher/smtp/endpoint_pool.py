"""Keeps the connections to one endpoint with one account, and learns the server's limits."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from outbox_server.services.dispatcher.smtp.lease import Lease
from outbox_server.services.dispatcher.smtp.result import GivenBackError
from outbox_server.services.dispatcher.smtp.session import KeptSession

# If a connection was idle for longer than this (seconds), a refusal may be about the
# idle time, so the number of mails that it carried is not learned.
_IDLING_S: Final = 10.0
_LEARNED_FOR_S: Final = 3600.0
_CAP_RISES_AFTER_S: Final = 600.0
# The same if the server did not say that there are too many connections, but behaved as if.
_GUESSED_CAP_RISES_AFTER_S: Final = 60.0
# The server counts as working for this many seconds after it accepted a mail.
_WORKS_FOR_S: Final = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0

# A place for a connection: an open connection, or None where a new one may be opened.
Place: TypeAlias = KeptSession | None


@dataclass(frozen=True, eq=False, slots=True)
class Waiter:
    """A send that waits for a place. `take` is called once, with a place or without one."""

    lease: Lease
    take: Callable[[Place | GivenBackError], None]


@dataclass(frozen=True, slots=True)
class PoolRules:
    """How many connections an endpoint may have, and when one is ended. Times are seconds."""

    size: int
    idle: float
    mails_per_connection: int
    connection_age: float


class EndpointPool:
    """Gives out connections and places for new ones, at most `cap` at once.

    A connection keeps its place until it is closed, even while it is idle or ends by QUIT. `spawn`
    runs a coroutine in the background. `clock` returns seconds.
    """

    def __init__(
        self,
        rules: PoolRules,
        clock: Callable[[], float],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._rules = rules
        self._clock = clock
        self._spawn = spawn
        self._idle: deque[KeptSession] = deque()
        self._waiters: deque[Waiter] = deque()
        # Fires when the first lease of a waiting send ends, or before.
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        # Connections that were opened and are not ended.
        self._ready: set[KeptSession] = set()
        self._places_taken = 0
        # The places of connections that are being ended.
        self._ending = 0
        self._closing = False
        self._serving = False
        self._cap = rules.size
        self._cap_changed_at = clock()
        self._cap_rises_after = _CAP_RISES_AFTER_S
        # When a mail was accepted last, on any connection.
        self._accepted_at = -math.inf
        self._pipelining_failed_at = -math.inf
        self._learned: int | None = None
        self._learned_at = 0.0
        self._pause = 0.0
        self._opens_at = -math.inf
        self.last_error = ""
        self.last_error_at: float | None = None
        self.last_used_at = clock()

    # State -----------------------------------------------------------------------------------

    @property
    def open_count(self) -> int:
        """The number of connections that are open, being opened or being ended."""
        return self._places_taken

    @property
    def cap(self) -> int:
        """The number of connections that there may be now.

        It drops when the server refuses a connection, and rises by one every ten minutes.
        """
        risen = int((self._clock() - self._cap_changed_at) / self._cap_rises_after)
        return min(self._cap + risen, self._rules.size)

    @property
    def learned_mails(self) -> int | None:
        """The number of mails that the server accepts per connection; None if it is not known.

        It is learned from a refusal, and forgotten after an hour.
        """
        if self._learned is not None and self._clock() - self._learned_at > _LEARNED_FOR_S:
            self._learned = None
        return self._learned

    @property
    def unused(self) -> bool:
        """Whether there is no connection, and nobody waits for one."""
        return self._places_taken == 0 and not self._waiters

    @property
    def forgettable(self) -> bool:
        """Whether the pool can be deleted: it has no connection, and nothing learned is valid."""
        return self.unused and self._clock() - self.last_used_at > _LEARNED_FOR_S

    # Connections and places ------------------------------------------------------------------

    def acquire(
        self, lease: Lease, take: Callable[[Place | GivenBackError], None]
    ) -> Waiter | None:
        """Call `take` with an idle connection, or with None, which is the place for a new one.

        If there is none, `take` is called later, and the result is the waiter for `leave`. It gets
        GivenBackError if the lease ends first, or the dispatcher drains.
        """
        self.last_used_at = self._clock()
        if not self._waiters:
            found, place = self._next()
            if found:
                take(place)
                return None
        waiter = Waiter(lease, take)
        self._waiters.append(waiter)
        self._set_timer(lease.until)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Forget a waiting send."""
        self._waiters.remove(waiter)

    def give_up(self) -> None:
        """End all waits for a connection with GivenBackError."""
        while self._waiters:
            self._waiters.popleft().take(GivenBackError())

    def serve(self) -> None:
        """Give free connections and places to the waiting sends."""
        if self._serving:
            return  # called again by a connection that `_next` ends, or by a send that has ended
        self._serving = True
        try:
            while self._waiters:
                found, place = self._next()
                if not found:
                    return
                self._waiters.popleft().take(place)
        finally:
            self._serving = False

    def _set_timer(self, end: float) -> None:
        """Make sure that a timer fires at a moment of `time.monotonic`, or before it.

        A timer per waiting send would cost more than the rest of the wait.
        """
        if end < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = end
            delay = max(0.0, end - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._end_old_waits)

    def _end_old_waits(self) -> None:
        """End the waits whose lease has ended."""
        self._timer, self._timer_at = None, math.inf
        old = [waiter for waiter in self._waiters if not waiter.lease.holds]
        if old:
            gone = set(old)
            self._waiters = deque(waiter for waiter in self._waiters if waiter not in gone)
        if self._waiters:
            self._set_timer(min(waiter.lease.until for waiter in self._waiters))
        for waiter in old:
            waiter.take(GivenBackError())

    def opened(self, session: KeptSession) -> None:
        """Note that a connection is open and can carry mail."""
        session.ready = True
        self._ready.add(session)

    def keep(self, session: KeptSession) -> None:
        """Take back a connection that can carry another mail. End it if it reached a limit."""
        session.idle_since = self._clock()
        if self._closing or not session.stream.connected or self._is_used_up(session):
            self.end(session)
            return
        self._idle.append(session)
        self.serve()

    def end(self, session: KeptSession) -> None:
        """End a connection in the background, by QUIT if it is still connected."""
        self._ready.discard(session)
        if session.stream.connected:
            self._ending += 1
            self._spawn(self._end(session))
        else:
            self.drop(session)

    async def replace(self, session: KeptSession) -> None:
        """End a connection. The caller keeps its place and opens a new connection."""
        self._ready.discard(session)
        await session.end()

    def drop(self, session: KeptSession | None) -> None:
        """Close a connection at once and free its place. None frees the place only."""
        if session is not None:
            self._ready.discard(session)
            session.abort()
        self._free_place()

    def close_idle(self) -> None:
        """End the connections that are idle for too long, are too old, or reached a limit."""
        for session in list(self._idle):
            if self._is_stale(session) or self._is_used_up(session):
                self._idle.remove(session)
                self.end(session)
        self.serve()

    def close(self) -> None:
        """End all idle connections now, and every other connection after its mail."""
        self._closing = True
        while self._idle:
            self.end(self._idle.popleft())

    # Learning from refusals ------------------------------------------------------------------

    def was_idling(self, session: KeptSession) -> bool:
        """Return whether a refusal on this connection may be about its idle time."""
        return self._clock() - session.idle_since > _IDLING_S

    def learn_mails(self, mails: int) -> None:
        """Remember how many mails the server accepted on a connection before a refusal."""
        self._learned, self._learned_at = mails, self._clock()

    def accepted(self) -> None:
        """Note that a mail was accepted."""
        self._accepted_at = self._clock()
        self._pause, self._opens_at = 0.0, -math.inf

    @property
    def trusts_pipelining(self) -> bool:
        """Whether commands may be sent in groups, if the server offers pipelining."""
        return self._clock() - self._pipelining_failed_at > _LEARNED_FOR_S

    def distrust_pipelining(self) -> None:
        """Note that the server offers pipelining, but did not answer a group of commands."""
        self._pipelining_failed_at = self._clock()

    def too_many(self, session: KeptSession) -> None:
        """Note that this connection is one too many. The cap drops to the number of the others.

        If there is no other, new connections wait: 1 s, doubled by each further refusal up to 60 s.
        """
        others = self._count_working_except(session)
        self._lower_cap(others, _CAP_RISES_AFTER_S)
        # Connections opened before the pause are refused for the same reason: they do not count.
        if others == 0 and session.opened_at >= self._opens_at:
            self._pause = min(max(2 * self._pause, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
            self._opens_at = self._clock() + self._pause
            asyncio.get_running_loop().call_later(self._pause, self.serve)

    def may_be_too_many(self, session: KeptSession) -> bool:
        """Note that a new connection failed. Return whether other connections work.

        If so, it may be one too many: many servers close such a connection without a reply. The cap
        rises again soon, because the server did not confirm it.
        """
        others = self._count_working_except(session)
        if self._clock() - self._accepted_at > _WORKS_FOR_S:
            others = 0
        if others:
            self._lower_cap(others, _GUESSED_CAP_RISES_AFTER_S)
        return others > 0

    def _count_working_except(self, session: KeptSession) -> int:
        return sum(other.stream.connected for other in self._ready if other is not session)

    def _lower_cap(self, cap: int, rises_after: float) -> None:
        self._cap, self._cap_changed_at = max(1, cap), self._clock()
        self._cap_rises_after = rises_after

    # -----------------------------------------------------------------------------------------

    def _next(self) -> tuple[bool, Place]:
        """Return whether there is a place, and the place: an idle connection, or None."""
        while self._idle:
            session = self._idle.pop()
            if not (session.sent_unsolicited_reply or self._is_stale(session)):
                return True, session
            self.end(session)
        if self._places_taken < self.cap and self._clock() >= self._opens_at:
            self._places_taken += 1
            return True, None
        return False, None

    def hand_back(self, place: Place) -> None:
        """Take back a place that was not used."""
        if place is None:
            self._free_place()
        elif self._closing:
            self.end(place)
        else:
            self._idle.append(place)
            self.serve()

    def _free_place(self) -> None:
        self._places_taken -= 1
        self.serve()

    async def _end(self, session: KeptSession) -> None:
        try:
            await session.end()
        finally:
            self._ending -= 1
            self._free_place()

    def _is_stale(self, session: KeptSession) -> bool:
        now = self._clock()
        return (
            not session.stream.connected
            or now - session.idle_since >= self._rules.idle
            or now - session.opened_at >= self._rules.connection_age
        )

    def _is_used_up(self, session: KeptSession) -> bool:
        """Return whether a connection has carried all mails allowed, or is above the cap."""
        most = min(self._rules.mails_per_connection, self.learned_mails or math.inf)
        return session.mails >= most or self._places_taken - self._ending > self.cap
