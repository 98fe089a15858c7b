"""Shares the places of a dispatcher among endpoints, so that a slow one never holds them all.

One place in five is kept for endpoints that answer quickly. Where an endpoint has its share, the
claims of senders that are known to send by it wait here: in Redis they are leases, in PostgreSQL
nothing has happened yet, and their places go to others. That is one wait a sender in its gap, and
no work for the jobs behind it.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

# Host and port: whoever logs in there, it is one server that answers or does not.
EndpointKey: TypeAlias = tuple[str, int]

# A send that takes longer makes its endpoint a slow one, until one is quicker again.
_SLOW_S: Final = 1.0
_KEPT_PART: Final = 5
# An endpoint that was not used for so long is nobody whom places are kept for.
_REMEMBERED_S: Final = 60.0
# Endpoints of senders that are remembered; a sender that is not is marked to learn its endpoint.
_SENDERS: Final = 100_000
_ENDPOINTS: Final = 1_000
# Claims that wait at once; beyond, they take places like any other.
_MOST_WAITING: Final = 1_000


@dataclass(eq=False, slots=True)
class Place:
    """The right to one send by an endpoint."""

    key: EndpointKey
    taken_at: float


@dataclass(slots=True)
class _Endpoint:
    under_way: dict[Place, None] = field(default_factory=dict)
    waiting: deque[asyncio.Future[Place | None]] = field(default_factory=deque)
    # Whether the last send that ended was slow; None: none has.
    was_slow: bool | None = None
    used_at: float = 0.0


class Shares:
    """Who may have one of `places` places; `clock` is monotonic, in seconds."""

    def __init__(self, places: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._places = places
        self._kept = max(1, places // _KEPT_PART) if places > 1 else 0
        self._clock = clock
        self._endpoints: OrderedDict[EndpointKey, _Endpoint] = OrderedDict()
        self._by_sender: OrderedDict[int, EndpointKey] = OrderedDict()
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """How many claims wait for a place."""
        return self._waiting

    def endpoint_of(self, sender_id: int) -> EndpointKey | None:
        """Return by which endpoint a sender sent last, as far as we remember."""
        return self._by_sender.get(sender_id)

    def learn(self, sender_id: int, key: EndpointKey) -> None:
        """Remember by which endpoint a sender sends."""
        self._by_sender[sender_id] = key
        if len(self._by_sender) > _SENDERS:
            self._by_sender.popitem(last=False)

    def take(self, key: EndpointKey) -> Place | None:
        """Return a place, or None if the endpoint has its share, or others wait for one."""
        endpoint = self._endpoint(key)
        full = self._waiting >= _MOST_WAITING
        if not full and (endpoint.waiting or not self._may_take(endpoint)):
            return None
        return self._place(key, endpoint)

    def leave(self, place: Place, *, sent: bool = True) -> None:
        """Give a place back; `sent`: after a send, which says how quick the endpoint is."""
        endpoint = self._endpoints[place.key]
        endpoint.under_way.pop(place, None)
        endpoint.used_at = self._clock()
        if sent:
            endpoint.was_slow = endpoint.used_at - place.taken_at > _SLOW_S

    def wait(self, key: EndpointKey, until: float) -> asyncio.Future[Place | None]:
        """Return a wait for a place from `hand_over`; None: `until` (loop time) came, or `give_up`.

        It counts as waiting until `stop_waiting`, so that nobody is overlooked in between.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Place | None] = loop.create_future()
        timer = loop.call_at(until, self._end, future)
        future.add_done_callback(lambda _: timer.cancel())
        self._endpoint(key).waiting.append(future)
        self._waiting += 1
        return future

    def stop_waiting(self) -> None:
        """Say that one who waited goes on."""
        self._waiting -= 1

    def hand_over(self) -> bool:
        """Give a place to the claim that waits longest where there is a share; False: to none."""
        if not self._waiting:
            return False
        for key, endpoint in list(self._endpoints.items()):
            while endpoint.waiting and self._may_take(endpoint):
                future = endpoint.waiting.popleft()
                if not future.done():
                    future.set_result(self._place(key, endpoint))
                    # The next one is another endpoint's, if there is one.
                    self._endpoints.move_to_end(key)
                    return True
        return False

    def give_up(self, key: EndpointKey | None = None) -> None:
        """Let the claims go that wait for an endpoint, or for any."""
        for found in self._endpoints if key is None else (key,):
            endpoint = self._endpoints.get(found, _Endpoint())
            for future in endpoint.waiting:
                self._end(future)
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

    def _forget(self, now: float) -> None:
        for key, each in list(self._endpoints.items()):
            idle = now - each.used_at > _REMEMBERED_S
            if idle and not each.under_way and not each.waiting:
                del self._endpoints[key]

    def _place(self, key: EndpointKey, endpoint: _Endpoint) -> Place:
        now = self._clock()
        place = Place(key, now)
        endpoint.under_way[place] = None
        endpoint.used_at = now
        return place

    def _may_take(self, endpoint: _Endpoint) -> bool:
        now = self._clock()
        share = self._places - self._kept
        if endpoint.was_slow is None and not endpoint.under_way:
            return True  # how else would we learn what it is like
        if self._is_slow(endpoint, now):
            slow = sum(
                len(each.under_way)
                for each in self._endpoints.values()
                if each.under_way and self._is_slow(each, now)
            )
            return slow < share
        if len(endpoint.under_way) < share:
            return True
        self._forget(now)
        return len(self._endpoints) == 1  # there is nobody to keep a place for

    def _is_slow(self, endpoint: _Endpoint, now: float) -> bool:
        oldest = next(iter(endpoint.under_way), None)
        stuck = oldest is not None and now - oldest.taken_at > _SLOW_S
        return endpoint.was_slow is not False or stuck
