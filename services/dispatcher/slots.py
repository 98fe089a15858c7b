"""The capacity of a dispatcher: decides which claimed job may go on, and which waits.

A dispatcher has a fixed number of slots (OUTBOX_DISPATCHER_CONCURRENCY). A claimed job holds a slot
until its outcome is recorded. To be sent it also needs a permit, so that no slow endpoint and no
user ever has all slots.

One slot in five is reserved for endpoints that answer quickly. When an endpoint has its share of
the permits, further claims for it wait here without a slot. They have a lease in Redis and are
still SCHEDULED in PostgreSQL, and other senders use their slots. A sender with a gap has one claim
at a time, so at most one of its jobs waits here.

A slow endpoint may hold a permit for minutes, because RFC 5321 allows ten minutes for one reply,
and a user can name any number of endpoints that never answer. So while other users send, no user
gets more than the share. A reserved slot goes to a slow endpoint only if its user has no other
permit at a slow endpoint. If there are two reserved slots or more, half of them are only for
endpoints that are known to be quick.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final, TypeAlias

# Host and port. The user name does not matter: it is one server that answers or does not.
EndpointKey: TypeAlias = tuple[str, int]

# A send that takes longer makes its endpoint slow, until a later send is quicker.
_SLOW_AFTER_S: Final = 1.0
_RESERVED_PART: Final = 5
# Slots are reserved for an endpoint or a user until they have not been seen for this long.
_REMEMBERED_S: Final = 60.0
# The routes of so many senders are remembered. The job of any other sender is marked first.
_MAX_SENDERS: Final = 100_000
_MAX_ENDPOINTS: Final = 1_000
_MAX_USERS: Final = 10_000
# More claims do not wait for a permit, because each free slot is offered to all of them.
MAX_WAITING: Final = 1_000


@dataclass(frozen=True, slots=True)
class Route:
    """The endpoint that a sender uses, and the user who owns the sender."""

    endpoint: EndpointKey
    user: str


@dataclass(eq=False, slots=True)
class Permit:
    """The right to one send by a route."""

    route: Route
    since: float


# Called when a wait ends: with a permit, or with None if the claim must go back to the queue.
Resume: TypeAlias = Callable[[Permit | None], None]


@dataclass(eq=False, slots=True)
class _Waiter:
    route: Route
    resume: Resume
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class _Endpoint:
    # The order in which endpoints get permits: the lowest is next.
    turn: int
    permits: dict[Permit, None] = field(default_factory=dict)
    waiting: int = 0
    # Whether the last send was slow. None means that no send has ended yet.
    was_slow: bool | None = None
    used_at: float = 0.0


@dataclass(slots=True)
class _User:
    permits: int = 0
    seen_at: float = 0.0


class Slots:
    """Counts the slots, shares them among endpoints and users, and keeps the claims that wait.

    `clock` is monotonic, in seconds.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        reserved = max(1, total // _RESERVED_PART) if total > 1 else 0
        self._share = total - reserved
        # The number of reserved slots that slow endpoints may have.
        self._lent = reserved // 2
        self._clock = clock
        self._in_flight = 0
        self._closed = False
        self._free = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._endpoints: dict[EndpointKey, _Endpoint] = {}
        self._turns = count()
        # The endpoints with permits in use.
        self._busy: dict[EndpointKey, _Endpoint] = {}
        # In the order in which they were last seen.
        self._users: OrderedDict[str, _User] = OrderedDict()
        self._routes: OrderedDict[int, Route] = OrderedDict()
        # The claims that wait, oldest first, by route, and their number.
        self._lines: dict[Route, dict[_Waiter, None]] = {}
        self._waiting = 0
        # The claims that came when too many waited.
        self._overflow: dict[_Waiter, None] = {}

    # Slots -----------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """The number of slots in use. It exceeds the total while many waits end at once."""
        return self._in_flight

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    async def take_free(self) -> int:
        """Wait until a slot is free and take all free slots. Return 0 after `close`."""
        while not self._closed:
            free = self._total - self._in_flight
            if free > 0:
                self._in_flight = self._total
                self._idle.clear()
                return free
            self._free.clear()
            await self._free.wait()
        return 0

    def release(self, number: int) -> None:
        """Give slots back. Claims that wait for one come before new claims."""
        self._in_flight -= number
        while self._in_flight < self._total and self._resume_next():
            pass
        if self._in_flight < self._total:
            self._free.set()
        if not (self._in_flight or self._waiting or self._overflow):
            self._idle.set()

    def close(self) -> None:
        """Give out no more slots, and end all waits without a permit."""
        self._closed = True
        self._free.set()
        waiting = [waiter for line in self._lines.values() for waiter in line]
        for waiter in (*waiting, *self._overflow):
            self._end_wait(waiter, None)

    async def wait_until_idle(self) -> None:
        """Wait until no slot is in use and no claim waits."""
        await self._idle.wait()

    # Permits ---------------------------------------------------------------------------------

    def route_of(self, sender_id: int) -> Route | None:
        """Return the last known route of a sender, or None if it is not known."""
        return self._routes.get(sender_id)

    def learn(self, sender_id: int, route: Route) -> None:
        """Remember the route of a sender."""
        self._routes[sender_id] = route
        if len(self._routes) > _MAX_SENDERS:
            self._routes.popitem(last=False)

    def permit(self, route: Route) -> Permit | None:
        """Return a permit. None if the endpoint or the user has its share, or other claims wait."""
        endpoint, user = self._endpoint(route.endpoint), self._user(route.user)
        slow = self._slow_permits(self._clock())
        if endpoint.waiting or not self._allows(route, endpoint, user, slow):
            return None
        return self._issue(route, endpoint, user)

    def end(self, permit: Permit, *, sent: bool = True) -> None:
        """Give a permit back. After a send, its duration says whether the endpoint is slow."""
        route = permit.route
        endpoint = self._endpoints[route.endpoint]
        endpoint.permits.pop(permit, None)
        if not endpoint.permits:
            self._busy.pop(route.endpoint, None)
        self._users[route.user].permits -= 1
        endpoint.used_at = self._clock()
        if sent:
            endpoint.was_slow = endpoint.used_at - permit.since > _SLOW_AFTER_S

    # Waiting ---------------------------------------------------------------------------------

    def wait(self, claims: Sequence[tuple[Route, Resume]], seconds: float) -> None:
        """Let claims wait for a permit, at most for `seconds`, and give back their slots.

        Each claim has a slot again when its `Resume` is called, with a permit or without one.

        If too many claims wait already, these only wait for the time to pass. Returned to the queue
        at once, they would be claimed again at once.
        """
        if self._closed:
            for _, resume in claims:
                resume(None)
            return
        loop = asyncio.get_running_loop()
        for route, resume in claims:
            waiter = _Waiter(route, resume)
            waiter.timer = loop.call_later(seconds, self._end_wait, waiter, None)
            if self._waiting < MAX_WAITING:
                self._lines.setdefault(route, {})[waiter] = None
                self._endpoint(route.endpoint).waiting += 1
                self._waiting += 1
            else:
                self._overflow[waiter] = None
        self.release(len(claims))

    def give_up(self, endpoint: EndpointKey) -> None:
        """End the waits for an endpoint without a permit."""
        lines = [line for route, line in self._lines.items() if route.endpoint == endpoint]
        for waiter in [waiter for line in lines for waiter in line]:
            self._end_wait(waiter, None)

    def _end_wait(self, waiter: _Waiter, permit: Permit | None) -> None:
        if waiter.timer is not None:
            waiter.timer.cancel()
        if waiter in self._overflow:
            del self._overflow[waiter]
        else:
            line = self._lines[waiter.route]
            del line[waiter]
            if not line:
                del self._lines[waiter.route]
            self._endpoints[waiter.route.endpoint].waiting -= 1
            self._waiting -= 1
        self._in_flight += 1
        waiter.resume(permit)

    def _resume_next(self) -> bool:
        """Resume the waiting claim whose turn it is. Return False if none may go on.

        The user with the fewest permits comes first, then the endpoint that has waited longest
        since its last turn.
        """
        if not self._waiting:
            return False
        slow = self._slow_permits(self._clock())
        candidates: list[tuple[_User, _Endpoint, _Waiter]] = []
        for route, line in self._lines.items():
            endpoint, user = self._endpoint(route.endpoint), self._user(route.user)
            if self._allows(route, endpoint, user, slow):
                candidates.append((user, endpoint, next(iter(line))))
        if not candidates:
            return False
        user, endpoint, waiter = min(candidates, key=lambda each: (each[0].permits, each[1].turn))
        endpoint.turn = next(self._turns)
        self._end_wait(waiter, self._issue(waiter.route, endpoint, user))
        return True

    # The shares of endpoints and users -------------------------------------------------------

    def _endpoint(self, key: EndpointKey) -> _Endpoint:
        found = self._endpoints.get(key)
        if found is None:
            if len(self._endpoints) >= _MAX_ENDPOINTS:
                self._forget_unused(self._clock())
            found = self._endpoints[key] = _Endpoint(next(self._turns))
        return found

    def _user(self, name: str) -> _User:
        """Return a user, and note that it was seen."""
        found = self._users.get(name)
        if found is None:
            found = self._users[name] = _User()
            if len(self._users) > _MAX_USERS:
                del self._users[
                    next(name for name, each in self._users.items() if not each.permits)
                ]
        found.seen_at = self._clock()
        self._users.move_to_end(name)
        return found

    def _forget_unused(self, now: float) -> None:
        for key, each in list(self._endpoints.items()):
            unused = now - each.used_at > _REMEMBERED_S
            if unused and not each.permits and not each.waiting:
                del self._endpoints[key]

    def _issue(self, route: Route, endpoint: _Endpoint, user: _User) -> Permit:
        permit = Permit(route, self._clock())
        endpoint.permits[permit] = None
        endpoint.used_at = permit.since
        self._busy[route.endpoint] = endpoint
        user.permits += 1
        return permit

    def _allows(self, route: Route, endpoint: _Endpoint, user: _User, slow: Counter[str]) -> bool:
        """Return whether a route may have one more permit.

        `slow` counts the permits at slow endpoints by user.
        """
        now = self._clock()
        if user.permits >= self._share and self._saw_others(route.user, now - _REMEMBERED_S):
            return False
        if self._is_slow(endpoint, now):
            taken = slow.total()
            if taken < self._share:
                return True
            if endpoint.was_slow is None and not endpoint.permits:
                # An endpoint that is never tried stays unknown.
                may_borrow = not slow[route.user] or not self._saw_others(route.user, -math.inf)
                return may_borrow and taken < self._share + max(1, self._lent)
            return not slow[route.user] and taken < self._share + self._lent
        if len(endpoint.permits) < self._share:
            return True
        self._forget_unused(now)
        return len(self._endpoints) == 1  # no other endpoint needs the reserved slots

    def _saw_others(self, name: str, since: float) -> bool:
        """Return whether another user was seen since then."""
        other = next((each for each in reversed(self._users) if each and each != name), None)
        return other is not None and self._users[other].seen_at >= since

    def _slow_permits(self, now: float) -> Counter[str]:
        """Count the permits at slow endpoints by user."""
        return Counter(
            permit.route.user
            for endpoint in self._busy.values()
            if self._is_slow(endpoint, now)
            for permit in endpoint.permits
        )

    def _is_slow(self, endpoint: _Endpoint, now: float) -> bool:
        """Return whether the last send was slow, or one that is under way. Unknown is slow."""
        oldest = next(iter(endpoint.permits), None)
        stuck = oldest is not None and now - oldest.since > _SLOW_AFTER_S
        return endpoint.was_slow is not False or stuck
