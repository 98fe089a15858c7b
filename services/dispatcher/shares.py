"""Decides which mail may use a slot of the dispatcher: the shares of users and of their endpoints.

Every mail that is being sent has a permit. One permit in five is reserved: no user ever has all
permits, so mail of another user is sent at once, whatever the servers of the first one do.

A server may hold a permit for minutes, because RFC 5321 allows ten minutes for one reply, and a
user can name any number of servers that never reply. So
- permits at slow endpoints are limited, for each user and for all users together. Half of the
  reserved permits, rounded up, are only for endpoints that are known to be quick;
- permits at endpoints that have not yet replied are limited for each user
  (OUTBOX_USER_UNPROVEN_ENDPOINTS).

What is known about an endpoint is known for one user and one account (`shared.queue.circuit_keys`),
so no user can make another user's endpoint slow. The operator's relay counts as quick until the
mail of a user is slow there. It is slow only for that user.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Final

# A send that takes longer marks its endpoint as slow, until a later send is quicker.
_SLOW_AFTER_S: Final = 1.0
_RESERVED_PART: Final = 5
# A permit is reserved for the other endpoints of a user until they were unused for this long.
_REMEMBERED_S: Final = 60.0
_MAX_ENDPOINTS: Final = 10_000
_MAX_USERS: Final = 10_000
# The maximum number of relay keys that `relay_keys` returns: their circuits are read at once.
_MOST_RELAY_KEYS: Final = 500


@dataclass(frozen=True, slots=True)
class Route:
    """The endpoint that a sender uses, and the user who owns the sender.

    `endpoint` is empty while it is not known: the job is marked first, to learn it. `endpoint` and
    `user` are keys of `shared.queue.circuit_keys`. `server` is the host and the port, for people.
    """

    endpoint: str
    user: str
    server: str = ""
    # The operator's relay.
    relay: bool = False


@dataclass(eq=False, slots=True)
class Permit:
    """The right to one send by a route."""

    route: Route
    since: float


@dataclass(eq=False, slots=True)
class EndpointUse:
    """The use of an endpoint by the mails of one user."""

    user: str
    relay: bool
    # The order in which endpoints get permits: the lowest is next.
    turn: int
    # Whether the last send was slow. None means that no send has ended yet.
    was_slow: bool | None = None
    # Whether the server has replied to the last send.
    proven: bool = False
    permits: dict[Permit, None] = field(default_factory=dict)
    waiting: int = 0
    used_at: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether no mail uses it or waits for it."""
        return not (self.permits or self.waiting)


@dataclass(eq=False, slots=True)
class User:
    """What one user has of the dispatcher."""

    permits: int = 0
    # Claims that wait for a permit.
    waiting: int = 0
    # Permits of claims whose endpoint is not known.
    unrouted: int = 0
    endpoints: set[str] = field(default_factory=set)

    @property
    def held(self) -> int:
        """The number of slots that the user has."""
        return self.permits + self.unrouted

    @property
    def active(self) -> bool:
        """Whether the user has or wants a slot."""
        return bool(self.held or self.waiting)


class Shares:
    """Gives out permits. `clock` is monotonic, in seconds."""

    def __init__(
        self, total: int, unproven: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`unproven` is the quota of users without an override."""
        self._total = total
        reserved = _reserved(total)
        # The maximum number of permits of one user, and of all users at slow endpoints.
        self.share = total - reserved
        # The number of reserved permits that slow endpoints may have.
        self._lent = reserved // 2
        # The maximum number of permits of a user at slow endpoints, and at one of several
        # endpoints.
        self._part = self.share - _reserved(self.share)
        self._unproven = unproven
        # The quotas of users with an override, by user.
        self.unproven_of: Mapping[str, int] = {}
        self._clock = clock
        # In the order in which they were last used.
        self._endpoints: OrderedDict[str, EndpointUse] = OrderedDict()
        self._turns = count()
        # The endpoints with permits in use.
        self._busy: dict[str, EndpointUse] = {}
        # In the order in which they were last seen.
        self._users: OrderedDict[str, User] = OrderedDict()
        # The users that have or want a slot.
        self._active: dict[str, User] = {}

    # Permits ---------------------------------------------------------------------------------

    def allows(self, route: Route, slow: Counter[str] | None = None) -> bool:
        """Return whether a route may have one more permit.

        `slow` is the result of `slow_permits`, if the caller has it.
        """
        user = self.user(route.user)
        if not route.endpoint:
            return user.held < self.share
        endpoint = self.endpoint(route)
        if user.held >= self.share:
            return False
        now = self._clock()
        if not self._is_slow(endpoint, now):
            return len(endpoint.permits) < self._part or self._is_only(route, user)
        most = self.unproven_of.get(route.user, self._unproven)
        if not endpoint.proven and self._unproven_permits(route.user) >= most:
            return False
        slow = self.slow_permits() if slow is None else slow
        mine, taken = slow[route.user], slow.total()
        if mine >= self._part:
            return False
        return taken < self.share or (not mine and taken < self.share + self._lent)

    def issue(self, route: Route) -> Permit:
        """Give a permit to a route that `allows` accepts."""
        permit = Permit(route, self._clock())
        user = self.user(route.user)
        if not route.endpoint:
            user.unrouted += 1
            self.note(route.user, user)
            return permit
        endpoint = self.endpoint(route)
        endpoint.permits[permit] = None
        endpoint.used_at = permit.since
        self._busy[route.endpoint] = endpoint
        user.permits += 1
        self.note(route.user, user)
        return permit

    def end(self, permit: Permit, *, sent: bool, answered: bool) -> None:
        """Take a permit back. The duration of a send says whether its endpoint is slow.

        `answered` means that the server has replied.
        """
        route = permit.route
        user = self._users[route.user]
        if not route.endpoint:
            user.unrouted -= 1
            self.note(route.user, user)
            return
        endpoint = self._endpoints[route.endpoint]
        endpoint.permits.pop(permit, None)
        if not endpoint.permits:
            self._busy.pop(route.endpoint, None)
        user.permits -= 1
        self.note(route.user, user)
        endpoint.used_at = self._clock()
        if sent:
            endpoint.was_slow = endpoint.used_at - permit.since > _SLOW_AFTER_S
            endpoint.proven = answered or route.relay

    def next_turn(self, route: Route) -> None:
        """Put an endpoint behind the other endpoints of its user."""
        self.endpoint(route).turn = next(self._turns)

    def relay_keys(self) -> list[str]:
        """Return the relay's keys of the users whose mail went there last, at most 500."""
        keys = (key for key, each in reversed(self._endpoints.items()) if each.relay)
        return list(islice(keys, _MOST_RELAY_KEYS))

    # Endpoints and users ---------------------------------------------------------------------

    def endpoint(self, route: Route) -> EndpointUse:
        """Return what is known about the endpoint of a route."""
        found = self._endpoints.get(route.endpoint)
        if found is None:
            self._make_room()
            found = EndpointUse(route.user, route.relay, next(self._turns), proven=route.relay)
            if route.relay:
                found.was_slow = False
            found.used_at = self._clock()
            self._endpoints[route.endpoint] = found
            self.user(route.user).endpoints.add(route.endpoint)
        self._endpoints.move_to_end(route.endpoint)
        return found

    def user(self, key: str) -> User:
        """Return what a user has, and note that the user was seen."""
        found = self._users.get(key)
        if found is None:
            found = self._users[key] = User()
            if len(self._users) > _MAX_USERS:
                unused = (
                    key for key, each in self._users.items() if not (each.active or each.endpoints)
                )
                if (oldest := next(unused, None)) is not None:
                    del self._users[oldest]
        self._users.move_to_end(key)
        return found

    def note(self, key: str, user: User) -> None:
        """Note a change of what a user has or wants."""
        if user.active:
            self._active[key] = user
        else:
            self._active.pop(key, None)

    def active(self) -> Iterator[tuple[str, User]]:
        """Yield the users that have or want a slot."""
        yield from self._active.items()

    @property
    def fair(self) -> int:
        """The number of slots up to which a user comes before the users who have more."""
        holding = sum(1 for user in self._active.values() if user.held)
        return max(2, math.ceil(self._total / max(1, holding)))

    def is_slow(self, route: Route) -> bool:
        """Return whether the endpoint of a route is known, and not known to be quick."""
        return bool(route.endpoint) and self._is_slow(self.endpoint(route), self._clock())

    def slow_permits(self) -> Counter[str]:
        """Count the permits at slow endpoints by user."""
        now = self._clock()
        return Counter(
            permit.route.user
            for endpoint in self._busy.values()
            if self._is_slow(endpoint, now)
            for permit in endpoint.permits
        )

    def _unproven_permits(self, user: str) -> int:
        unproven = (each for each in self._busy.values() if not each.proven)
        return sum(len(each.permits) for each in unproven if each.user == user)

    def _is_slow(self, endpoint: EndpointUse, now: float) -> bool:
        """Return whether the last send, or one in progress, is slow. Unknown means slow."""
        oldest = next(iter(endpoint.permits), None)
        stuck = oldest is not None and now - oldest.since > _SLOW_AFTER_S
        return endpoint.was_slow is not False or stuck

    def _is_only(self, route: Route, user: User) -> bool:
        """Return whether the user has used no other endpoint lately."""
        now = self._clock()
        for key in user.endpoints - {route.endpoint}:
            each = self._endpoints[key]
            if not each.idle or now - each.used_at <= _REMEMBERED_S:
                return False
            self._forget(key)
        return True

    def _make_room(self) -> None:
        """Forget the endpoint that was unused for the longest time, if there are too many."""
        if len(self._endpoints) >= _MAX_ENDPOINTS:
            idle = (key for key, each in self._endpoints.items() if each.idle)
            if (oldest := next(idle, None)) is not None:
                self._forget(oldest)

    def _forget(self, key: str) -> None:
        self._users[self._endpoints.pop(key).user].endpoints.discard(key)


def _reserved(total: int) -> int:
    return max(1, total // _RESERVED_PART) if total > 1 else 0
