"""The capacity of a dispatcher: decides which claimed job may go on, and which waits.

A dispatcher has a fixed number of slots (OUTBOX_DISPATCHER_CONCURRENCY). A claimed job holds a slot
until its outcome is recorded. To be sent it also needs a permit (`shares.py`), so that no slow
endpoint and no user ever has all slots.

When an endpoint or a user has its share of the permits, further claims for it wait here without a
slot. They have a lease in Redis and are still SCHEDULED in PostgreSQL, and other senders use their
slots. A sender with a gap has one claim at a time, so at most one of its jobs waits here.

While sends end quickly, a claim also takes jobs ahead, for the slots that will be free next. They
wait in the same way, but briefly. Only Redis has their leases; PostgreSQL knows nothing of them. As
soon as sends end, they take over the slots, in the statement that records the ends.

A user who has its share, or for whom many claims wait, is limited in the next claim (`limits`), so
that the queue gives the slots that are left to other users. If a user has many senders with due
mail, they wait in the queue, and not here.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias

from outbox_server.services.dispatcher.claims_ahead import AHEAD_PER_SLOT, ClaimsAhead
from outbox_server.services.dispatcher.recent_permits import RecentPermits
from outbox_server.services.dispatcher.shares import Permit, Route, Shares, User
from outbox_server.shared.queue.records import Claim
from outbox_server.shared.queue.user_limits import UserLimit

# The routes of at most this many senders are remembered. The job of any other sender is marked
# before its route is known.
_MAX_SENDERS: Final = 100_000
# The maximum number of claims that wait for a permit. They are few because each free slot is
# offered to all of them.
MAX_WAITING: Final = 1_000
# The same for one user.
MAX_WAITING_OF_USER: Final = 250
# Jobs claimed ahead return to the queue after this time, if sends take longer than before.
_LONGEST_AHEAD_S: Final = 0.2


# Called when a wait ends: with a permit, or with None if the claim must go back to the queue.
Resume: TypeAlias = Callable[[Permit | None], None]


@dataclass(eq=False, slots=True)
class _Waiter:
    route: Route
    resume: Resume
    # It was claimed ahead: it waits for a slot, or for a permit at a quick endpoint.
    ahead: bool = False
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
        # Whether `on_room` is to be called.
        self._room = False
        self._ahead = ClaimsAhead(total, clock)
        self._in_flight = 0
        # Slots that a claim in progress has taken. No job is marked for them yet.
        self._claiming = 0
        # Slots that count twice, because one statement ends one send and marks the next.
        self._handed_over = 0
        # Slots of claims that were not marked and whose return to the queue is not settled yet.
        self._returning = 0
        self._closed = False
        self._free = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._routes: OrderedDict[int, Route] = OrderedDict()
        self._recent = RecentPermits(total)
        # The claims that wait, oldest first, by route, and their number.
        self._lines: dict[Route, dict[_Waiter, None]] = {}
        self._waiting = 0
        # The claims that came when too many waited.
        self._overflow: dict[_Waiter, None] = {}

    # Slots -----------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """The number of slots."""
        return self._total

    @property
    def in_flight(self) -> int:
        """The number of slots of jobs that are marked, or may be. It never exceeds the total.

        A slot that passes from a send that has ended to the next job, in the statement that records
        the one and marks the other, counts once: only one of them may be in doubt after a crash.
        """
        return self._in_flight - self._claiming - self._handed_over - self._returning

    @property
    def excess(self) -> int:
        """How many slots more than the total are in use while some are being handed over.

        The next statement must record as many ends before it may mark all of its claims.
        """
        return max(0, self._in_flight - self._returning - self._total)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    async def take_free(self) -> int:
        """Wait until a slot is free, and take all free slots. Return 0 after `close`.

        It also returns 0 if no slot is free, but jobs may be claimed ahead.
        """
        while not self._closed:
            free = max(0, self._total - self._in_flight)
            if free or self._ahead_room():
                self._in_flight += free
                if free:
                    self._idle.clear()
                return free
            self._free.clear()
            await self._free.wait()
        return 0

    @contextmanager
    def claiming(self, number: int) -> Iterator[None]:
        """Do not count `number` slots that `take_free` took as jobs in flight, during a claim."""
        self._claiming += number
        try:
            yield
        finally:
            self._claiming -= number

    def take_ahead(self) -> int:
        """Return how many jobs more than there are free slots a claim may take now.

        `return_ahead` follows when the claim has ended and its jobs wait.
        """
        room = self._ahead_room()
        self._ahead.taken += room
        if room:
            self._idle.clear()
        return room

    def return_ahead(self, number: int) -> None:
        """Return the room that `take_ahead` took."""
        self._ahead.taken -= number
        self.settled(0)

    def _ahead_room(self) -> int:
        # If too many claims wait already, further ones would go back to the queue unused.
        return self._ahead.room(MAX_WAITING - self._waiting)

    def hand_over(self, number: int) -> None:
        """Let claims that wait use the slots of `number` sends that have ended.

        One statement must mark those claims and record those ends. `end_hand_over` follows after
        it. The slots of ends that it did not record stay in use.
        """
        self._ahead.sends_ended(number)
        before = self._in_flight
        self._resume_waiting(self._total + number)
        self._handed_over += self._in_flight - before
        if self._ahead_room():
            # The next claim and the statement run at the same time.
            self._free.set()

    def end_hand_over(self) -> None:
        """Count the slots that were handed over as those of other claims again."""
        self._handed_over = 0

    def not_marked(self, number: int) -> None:
        """Note that claims were not marked. They keep their slots until they are settled."""
        self._returning += number
        self._handed_over -= min(number, self._handed_over)

    def release(self, number: int) -> None:
        """Give slots back. Claims that wait for one come before new claims."""
        self._in_flight -= number
        self._resume_waiting(self._total)
        if self._in_flight < self._total or self._ahead_room():
            self._free.set()
        if not (self._in_flight or self._waiting or self._overflow or self._ahead.taken):
            self._idle.set()

    def settled(self, number: int, returned: int = 0) -> None:
        """Give back the slots of claims that are settled, and let claims use the room they leave.

        `returned` of them were not marked. Call it once per group and not once per reply, so that
        claims are made in large groups.
        """
        self._returning -= returned
        self.release(number)
        if self._room and self._limited_have_room():
            self._room = False
            self._on_room()

    def _limited_have_room(self) -> bool:
        """Return whether a claim could bring jobs of a user who was limited in the last one."""
        if self._ahead_room():
            return True
        return self._in_flight < self._total and any(map(self.limited_has_room, self._limited))

    def limited_has_room(self, shard: int) -> bool:
        """Return whether a user limited in the last claim of a shard has less than its share."""
        share = self._shares.share
        return any(self._shares.user(key).held < share for key in self._limited.get(shard, ()))

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
        """Return the limits of the users from whom a claim of `want` jobs may take fewer.

        A user may also have its share of the jobs that `take_ahead` returned.
        """
        found = []
        fair, share = self._shares.fair, self._shares.share
        served = self._recent.served()
        users = dict(self._shares.active()) | {key: self._shares.user(key) for key in served}
        for key, user in users.items():
            ahead = max(0, min(self._ahead.taken, AHEAD_PER_SLOT * share - user.waiting))
            most = min(share - user.held + ahead, MAX_WAITING_OF_USER - user.waiting)
            first = 0 if key in served else min(most, fair - user.held)
            if first < want:
                found.append(UserLimit(key, first=max(0, first), most=max(0, most)))
        return found

    def limited(self, shard: int, limits: Iterable[UserLimit]) -> None:
        """Note whose jobs a claim of a shard may leave out: `on_room` is called for them."""
        self._limited[shard] = {limit.user for limit in limits}

    def set_unproven(self, overrides: Mapping[str, int]) -> None:
        """Take the quotas of the users with an override. Resume the claims that may now go on."""
        self._shares.unproven_of = overrides
        self.settled(0)

    def _has_room(self, key: str, user: User) -> None:
        self._shares.note(key, user)
        self._room = self._room or any(key in users for users in self._limited.values())

    def in_turn(self, claims: Sequence[Claim]) -> list[Claim]:
        """Return claims in the order in which they get slots: of the users who have less first."""
        held: dict[str, int] = {}
        order: list[tuple[int, int]] = []
        for place, claim in enumerate(claims):
            number = held.get(claim.user)
            if number is None:
                number = self._shares.user(claim.user).held
            held[claim.user] = number + 1
            order.append((number, place))
        if len(held) > 1:
            order.sort()
        return [claims[place] for _, place in order]

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

    def permit(self, route: Route, *, marked: bool = False) -> Permit | None:
        """Return a permit. None if the endpoint or the user has its share, or other claims wait.

        A job that is `marked` already comes before the claims that wait.
        """
        waits = self._shares.endpoint(route).waiting if route.endpoint else route in self._lines
        waits = waits and not marked
        if waits or not self._shares.allows(route):
            return None
        return self._issue(route)

    def _issue(self, route: Route) -> Permit:
        self._recent.add(route.user)
        return self._shares.issue(route)

    def end(self, permit: Permit, *, sent: bool = True, answered: bool = True) -> None:
        """Give a permit back. After a send, its duration says whether the endpoint is slow.

        `answered` means that the server has replied.
        """
        self._shares.end(permit, sent=sent, answered=answered)
        self._has_room(permit.route.user, self._shares.user(permit.route.user))

    # Waiting ---------------------------------------------------------------------------------

    def wait(
        self, claims: Sequence[tuple[Route, Resume]], seconds: float, slots: int | None = None
    ) -> int:
        """Let claims wait for a permit and a slot, at most for `seconds`.

        They give back their slots: one each, or `slots` in all. Each claim has a slot again when
        its `Resume` is called, with a permit or without one. Returns how many of them wait for a
        permit at a slow endpoint. The others count as claimed ahead.

        If too many claims wait already, these get no permit and wait until the time is over. If
        they returned to the queue at once, they would be claimed again at once.
        """
        slots = len(claims) if slots is None else slots
        if self._closed:
            self._in_flight += len(claims) - slots
            self._returning += len(claims)
            for _, resume in claims:
                resume(None)
            return 0
        loop = asyncio.get_running_loop()
        slow = 0
        for route, resume in claims:
            waiter = _Waiter(route, resume, ahead=not self._shares.is_slow(route))
            slow += not waiter.ahead
            limit = min(seconds, _LONGEST_AHEAD_S) if waiter.ahead else seconds
            waiter.timer = loop.call_later(limit, self._end_wait, waiter, None)
            if self._waiting < MAX_WAITING:
                self._lines.setdefault(route, {})[waiter] = None
                self._ahead.waiting += waiter.ahead
                self._count_waiting(route, 1)
            else:
                self._overflow[waiter] = None
        self.release(slots)
        return slow

    def give_up(self, endpoint: str) -> None:
        """End the waits for an endpoint without a permit."""
        lines = [line for route, line in self._lines.items() if route.endpoint == endpoint]
        for waiter in [waiter for line in lines for waiter in line]:
            self._end_wait(waiter, None)

    def _count_waiting(self, route: Route, number: int) -> User:
        user = self._shares.user(route.user)
        user.waiting += number
        if route.endpoint:
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
            self._ahead.waiting -= waiter.ahead
            if not line:
                del self._lines[waiter.route]
            self._has_room(waiter.route.user, self._count_waiting(waiter.route, -1))
        self._in_flight += 1
        self._returning += permit is None
        waiter.resume(permit)

    def _resume_waiting(self, most: int) -> None:
        """Resume waiting claims until `most` slots are in use.

        The user with the fewest slots comes first, then the endpoint that has waited longest since
        its last turn.
        """
        if not self._waiting or self._in_flight >= most or self._closed:
            return
        slow = self._shares.slow_permits()
        order = [(*self._rank(route), n, route) for n, route in enumerate(self._lines)]
        heapq.heapify(order)
        while order and self._in_flight < most:
            held, turn, n, route = heapq.heappop(order)
            line = self._lines.get(route)
            if line is None or not self._shares.allows(route, slow):
                continue
            rank = self._rank(route)
            if rank == (held, turn):
                if route.endpoint:
                    self._shares.next_turn(route)
                permit = self._issue(route)
                if self._shares.is_slow(route):
                    slow = self._shares.slow_permits()
                self._end_wait(next(iter(line)), permit)
                rank = self._rank(route)
            heapq.heappush(order, (*rank, n, route))

    def _rank(self, route: Route) -> tuple[int, int]:
        turn = self._shares.endpoint(route).turn if route.endpoint else -1
        return self._shares.user(route.user).held, turn
