"""Shares the places of a dispatcher among endpoints and users, so that a slow one never has all.

One place in five is kept for endpoints that answer quickly. Where an endpoint has its share, the
claims of senders that are known to send by it wait here: in Redis they are leases, in PostgreSQL
nothing has happened yet, and their places go to others. That is one wait a sender in its gap, and
no work for the jobs behind it.

A slow endpoint may hold a place for minutes (RFC 5321 allows ten for one reply), and a user can
name any number of endpoints that never answer. So no user who is not alone has more than the share,
and a kept place goes to a slow endpoint only as far as its user holds no other place at a slow one.
Half of the kept places, where there is more than one, are for endpoints that are known to be quick.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

# Host and port: whoever logs in there, it is one server that answers or does not.
EndpointKey: TypeAlias = tuple[str, int]

# A send that takes longer makes its endpoint a slow one, until one is quicker again.
_SLOW_S: Final = 1.0
_KEPT_PART: Final = 5
# An endpoint or user that was not seen for so long is nobody whom places are kept for.
_REMEMBERED_S: Final = 60.0
# Endpoints of senders that are remembered; a sender that is not is marked to learn its endpoint.
_SENDERS: Final = 100_000
_ENDPOINTS: Final = 1_000
_USERS: Final = 10_000
# Claims that wait for a place at once.
MOST_WAITING: Final = 1_000


@dataclass(eq=False, slots=True)
class Place:
    """The right to one send by an endpoint, for a user."""

    key: EndpointKey
    user: str
    taken_at: float


@dataclass(eq=False, slots=True)
class _Wait:
    user: str
    future: asyncio.Future[Place | None]


@dataclass(slots=True)
class _Endpoint:
    under_way: dict[Place, None] = field(default_factory=dict)
    waiting: deque[_Wait] = field(default_factory=deque)
    # Whether the last send that ended was slow; None: none has.
    was_slow: bool | None = None
    used_at: float = 0.0


@dataclass(slots=True)
class _User:
    under_way: int = 0
    seen_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Route:
    """By which endpoint a sender sends, and whose sender it is; `user` empty: not known."""

    key: EndpointKey
    user: str


class Shares:
    """Who may have one of `places` places; `clock` is monotonic, in seconds."""

    def __init__(self, places: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._places = places
        self._kept = max(1, places // _KEPT_PART) if places > 1 else 0
        self._share = places - self._kept
        # Of the kept places, those that a slow endpoint may have.
        self._lent = self._kept // 2
        self._clock = clock
        self._endpoints: OrderedDict[EndpointKey, _Endpoint] = OrderedDict()
        # Endpoints with sends under way.
        self._busy: dict[EndpointKey, _Endpoint] = {}
        # The last is the one that was seen last.
        self._users: OrderedDict[str, _User] = OrderedDict()
        self._by_sender: OrderedDict[int, Route] = OrderedDict()
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """How many claims wait for a place."""
        return self._waiting

    @property
    def full(self) -> bool:
        """Whether no more claims may wait."""
        return self._waiting >= MOST_WAITING

    def route_of(self, sender_id: int) -> Route | None:
        """Return by which endpoint a sender sent last, as far as we remember."""
        return self._by_sender.get(sender_id)

    def learn(self, sender_id: int, route: Route) -> None:
        """Remember by which endpoint a sender sends."""
        self._by_sender[sender_id] = route
        if len(self._by_sender) > _SENDERS:
            self._by_sender.popitem(last=False)

    def take(self, route: Route) -> Place | None:
        """Return a place, or None if endpoint or user has its share, or others wait for one."""
        endpoint, user = self._endpoint(route.key), self._user(route.user)
        slow = self._slow_users(self._clock())
        if endpoint.waiting or not self._may_take(endpoint, route.user, user, slow):
            return None
        return self._place(route, endpoint, user)

    def leave(self, place: Place, *, sent: bool = True) -> None:
        """Give a place back; `sent`: after a send, which says how quick the endpoint is."""
        endpoint = self._endpoints[place.key]
        endpoint.under_way.pop(place, None)
        if not endpoint.under_way:
            self._busy.pop(place.key, None)
        self._users[place.user].under_way -= 1
        endpoint.used_at = self._clock()
        if sent:
            endpoint.was_slow = endpoint.used_at - place.taken_at > _SLOW_S

    def wait(self, route: Route, until: float) -> asyncio.Future[Place | None]:
        """Return a wait for a place from `hand_over`; None: `until` (loop time) came, or `give_up`.

        It counts as waiting until `stop_waiting`, so that nobody is overlooked in between.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Place | None] = loop.create_future()
        timer = loop.call_at(until, self._end, future)
        future.add_done_callback(lambda _: timer.cancel())
        self._endpoint(route.key).waiting.append(_Wait(route.user, future))
        self._waiting += 1
        return future

    def stop_waiting(self) -> None:
        """Say that one who waited goes on."""
        self._waiting -= 1

    def hand_over(self) -> bool:
        """Give a place to a claim that waits; False: to none.

        To the user who has the fewest places, and there to the endpoint whose turn it is.
        """
        if not self._waiting:
            return False
        slow = self._slow_users(self._clock())
        first = min(
            (
                (self._user(wait.user).under_way, place, key, wait)
                for place, (key, endpoint) in enumerate(list(self._endpoints.items()))
                for wait in self._next_waits(endpoint, slow)
            ),
            key=lambda each: each[:2],
            default=None,
        )
        if first is None:
            return False
        _, _, key, wait = first
        endpoint = self._endpoints[key]
        endpoint.waiting.remove(wait)
        wait.future.set_result(self._place(Route(key, wait.user), endpoint, self._user(wait.user)))
        # The next one is another endpoint's, if there is one.
        self._endpoints.move_to_end(key)
        return True

    def _next_waits(self, endpoint: _Endpoint, slow: Counter[str]) -> list[_Wait]:
        """Return the claims at an endpoint that may have a place: of each user the oldest."""
        while endpoint.waiting and endpoint.waiting[0].future.done():
            endpoint.waiting.popleft()
        oldest: dict[str, _Wait] = {}
        for wait in endpoint.waiting:
            if not wait.future.done():
                oldest.setdefault(wait.user, wait)
        return [
            wait
            for name, wait in oldest.items()
            if self._may_take(endpoint, name, self._user(name), slow)
        ]

    def give_up(self, key: EndpointKey | None = None) -> None:
        """Let the claims go that wait for an endpoint, or for any."""
        for found in self._endpoints if key is None else (key,):
            endpoint = self._endpoints.get(found, _Endpoint())
            for wait in endpoint.waiting:
                self._end(wait.future)
            endpoint.waiting.clear()

    @staticmethod
    def _end(future: asyncio.Future[Place | None]) -> None:
        if not future.done():
            future.set_result(None)

    def _endpoint(self, key: EndpointKey) -> _Endpoint:
        found = self._endpoints.get(key)
        if found is None:
            if len(self._endpoints) >= _ENDPOINTS:
                self._forget(self._clock())
            found = self._endpoints[key] = _Endpoint()
        return found

    def _user(self, name: str) -> _User:
        """Return a user, who has been seen now."""
        found = self._users.get(name)
        if found is None:
            found = self._users[name] = _User()
            if len(self._users) > _USERS:
                idle = (name for name, each in self._users.items() if not each.under_way)
                del self._users[next(idle)]
        found.seen_at = self._clock()
        self._users.move_to_end(name)
        return found

    def _forget(self, now: float) -> None:
        for key, each in list(self._endpoints.items()):
            idle = now - each.used_at > _REMEMBERED_S
            if idle and not each.under_way and not each.waiting:
                del self._endpoints[key]

    def _place(self, route: Route, endpoint: _Endpoint, user: _User) -> Place:
        now = self._clock()
        place = Place(route.key, route.user, now)
        endpoint.under_way[place] = None
        endpoint.used_at = now
        self._busy[route.key] = endpoint
        user.under_way += 1
        return place

    def _may_take(self, endpoint: _Endpoint, name: str, user: _User, slow: Counter[str]) -> bool:
        """Say whether a user may have a place at an endpoint; `slow`: places at slow ones."""
        now = self._clock()
        if user.under_way >= self._share and self._has_others_since(name, now - _REMEMBERED_S):
            return False
        if self._is_slow(endpoint, now):
            taken = slow.total()
            if taken < self._share:
                return True
            if endpoint.was_slow is None and not endpoint.under_way:
                # How else would we learn what it is like?
                may_borrow = not slow[name] or not self._has_others_since(name, -math.inf)
                return may_borrow and taken < self._share + max(1, self._lent)
            return not slow[name] and taken < self._share + self._lent
        if len(endpoint.under_way) < self._share:
            return True
        self._forget(now)
        return len(self._endpoints) == 1  # there is nobody to keep a place for

    def _has_others_since(self, name: str, since: float) -> bool:
        """Say whether another user was seen since then."""
        other = next((each for each in reversed(self._users) if each and each != name), None)
        return other is not None and self._users[other].seen_at >= since

    def _slow_users(self, now: float) -> Counter[str]:
        """Count the places at slow endpoints, by user."""
        return Counter(
            place.user
            for endpoint in self._busy.values()
            if self._is_slow(endpoint, now)
            for place in endpoint.under_way
        )

    def _is_slow(self, endpoint: _Endpoint, now: float) -> bool:
        oldest = next(iter(endpoint.under_way), None)
        stuck = oldest is not None and now - oldest.taken_at > _SLOW_S
        return endpoint.was_slow is not False or stuck
