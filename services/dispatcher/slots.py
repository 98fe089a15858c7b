"""The capacity of a dispatcher: decides which claimed job may go on, and which waits.

A dispatcher has a fixed number of slots (OUTBOX_DISPATCHER_CONCURRENCY). A claimed job holds a slot
until its outcome is recorded. To be sent it also needs a permit (`shares.py`), so that no slow
endpoint and no user ever has all slots.

When an endpoint or a user has its share of the permits, further claims for it wait here without a
slot. They have a lease in Redis and are still SCHEDULED in PostgreSQL, and other senders use their
slots. A sender with a gap has one claim at a time, so at most one of its jobs waits here.

A user who has a share, or for whom many claims wait, is named in the next claim (`limits`), so that
the queue gives the slots that are left to other users. Where a user has many senders with due mail,
they wait in the queue, and not here.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from outbox_server.services.dispatcher.shares import Endpoint, Permit, Route, Shares, User
from outbox_server.shared.queue.user_limits import UserLimit

# The routes of so many senders are remembered. The job of any other sender is marked first.
_MAX_SENDERS: Final = 100_000
# More claims do not wait for a permit, because each free slot is offered to all of them.
MAX_WAITING: Final = 1_000
# The same for one user.
MAX_WAITING_OF_USER: Final = 250


# Called when a wait ends: with a permit, or with None if the claim must go back to the queue.
Resume: TypeAlias = Callable[[Permit | None], None]


@dataclass(eq=False, slots=True)
class _Waiter:
    route: Route
    resume: Resume
    timer: asyncio.TimerHandle | None = None


class Slots:
    """Counts the slots, and keeps the claims that wait for a permit.

    `clock` is monotonic, in seconds. `on_room` is called when a user who was limited in a claim may
    have more.
    """

    def __init__(
        self,
        total: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        unproven: int,
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        """`unproven` is the quota of sends to endpoints that have not replied yet."""
        self._total = total
        self._shares = Shares(total, unproven, clock)
        self._on_room = on_room
        # The users that were limited in the last claim of each shard.
        self._limited: dict[int, set[str]] = {}
        self._in_flight = 0
        self._closed = False
        self._free = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
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

    # Users -----------------------------------------------------------------------------------

    def limits(self, want: int) -> list[UserLimit]:
        """Return the users of whom a claim of `want` jobs may not take that many."""
        found = []
        fair = self._shares.fair
        for key, user in self._shares.active():
            most = min(self._shares.share - user.held, MAX_WAITING_OF_USER - user.waiting)
            first = min(most, fair - user.held)
            if first < want:
                found.append(UserLimit(key, first=max(0, first), most=max(0, most)))
        return found

    def limited(self, shard: int, limits: Iterable[UserLimit]) -> None:
        """Note whose jobs a claim of a shard may leave out: `on_room` is called for them."""
        self._limited[shard] = {limit.user for limit in limits}

    def set_unproven(self, overrides: Mapping[str, int]) -> None:
        """Take the quotas of the users with an override. Claims that may now go on do so."""
        self._shares.unproven_of = overrides
        self.release(0)

    def begin_unrouted(self, user: str) -> None:
        """Count a claim whose route is not known yet."""
        found = self._shares.user(user)
        found.unrouted += 1
        self._shares.note(user, found)

    def end_unrouted(self, user: str) -> None:
        """End what `begin_unrouted` began."""
        found = self._shares.user(user)
        found.unrouted -= 1
        self._has_room(user, found)

    def _has_room(self, key: str, user: User) -> None:
        self._shares.note(key, user)
        if any(key in users for users in self._limited.values()):
            self._on_room()

    # Permits ---------------------------------------------------------------------------------

    def relay_keys(self) -> list[str]:
        """Return the relay's keys of the users whose mail went there last."""
        return self._shares.relay_keys()

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
        if self._shares.endpoint(route).waiting or not self._shares.allows(route):
            return None
        return self._shares.issue(route)

    def end(self, permit: Permit, *, sent: bool = True, answered: bool = True) -> None:
        """Give a permit back. After a send, its duration says whether the endpoint is slow.

        `answered` means that the server has replied.
        """
        self._shares.end(permit, sent=sent, answered=answered)
        self._has_room(permit.route.user, self._shares.user(permit.route.user))

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
                self._count_waiting(route, 1)
            else:
                self._overflow[waiter] = None
        self.release(len(claims))

    def give_up(self, endpoint: str) -> None:
        """End the waits for an endpoint without a permit."""
        lines = [line for route, line in self._lines.items() if route.endpoint == endpoint]
        for waiter in [waiter for line in lines for waiter in line]:
            self._end_wait(waiter, None)

    def _count_waiting(self, route: Route, number: int) -> User:
        user = self._shares.user(route.user)
        user.waiting += number
        self._shares.endpoint(route).waiting += number
        self._waiting += number
        self._shares.note(route.user, user)
        return user

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
            self._has_room(waiter.route.user, self._count_waiting(waiter.route, -1))
        self._in_flight += 1
        waiter.resume(permit)

    def _resume_next(self) -> bool:
        """Resume the waiting claim whose turn it is. Return False if none may go on.

        The user with the fewest permits comes first, then the endpoint that has waited longest
        since its last turn.
        """
        if not self._waiting:
            return False
        slow = self._shares.slow_permits()
        candidates: list[tuple[User, Endpoint, _Waiter]] = [
            (self._shares.user(route.user), self._shares.endpoint(route), next(iter(line)))
            for route, line in self._lines.items()
            if self._shares.allows(route, slow)
        ]
        if not candidates:
            return False
        _, _, waiter = min(candidates, key=lambda each: (each[0].permits, each[1].turn))
        self._shares.next_turn(waiter.route)
        self._end_wait(waiter, self._shares.issue(waiter.route))
        return True
