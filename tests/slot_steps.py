"""What tests do with the slots of a dispatcher."""

from __future__ import annotations

import asyncio

from outbox_server.services.dispatcher.shares import Permit, Route
from outbox_server.services.dispatcher.slots import Slots
from tests.clock import Clock

SLOW, QUICK, NEW = (Route(f"{name}.test", "anna") for name in ("slow", "quick", "new"))


def take_all(slots: Slots, route: Route, most: int = 5) -> list[Permit]:
    permits: list[Permit] = []
    while len(permits) < most and (permit := slots.permit(route)):
        permits.append(permit)
    return permits


def send(
    slots: Slots, clock: Clock, route: Route, seconds: float, *, answered: bool = True
) -> None:
    permit = slots.permit(route)
    assert permit is not None
    clock.now += seconds
    slots.end(permit, answered=answered)


def route(host: str, user: str) -> Route:
    return Route(f"{host} of {user}", user)


def silent(slots: Slots, number: int) -> list[Permit]:
    """Let users wait for servers that do not reply, one each."""
    permits = [slots.permit(route("silent.test", f"user{each}")) for each in range(number)]
    assert None not in permits
    return [permit for permit in permits if permit]


def relay(user: str) -> Route:
    return Route(f"relay:{user}", user, relay=True)


class WaitingClaim:
    """A claim that waits for a permit."""

    def __init__(self) -> None:
        self._end = asyncio.Event()
        self.permit: Permit | None = None

    @property
    def ended(self) -> bool:
        return self._end.is_set()

    def resume(self, permit: Permit | None) -> None:
        assert not self.ended
        self.permit = permit
        self._end.set()

    async def end(self) -> None:
        await asyncio.wait_for(self._end.wait(), 10)


async def take(slots: Slots, number: int) -> None:
    slots.release(await slots.take_free() - number)


async def wait(slots: Slots, *routes: Route, seconds: float = 30) -> list[WaitingClaim]:
    """Take a slot for each claim, and let the claims wait."""
    await take(slots, len(routes))
    waits = [WaitingClaim() for _ in routes]
    slots.wait([(route, each.resume) for route, each in zip(routes, waits, strict=True)], seconds)
    return waits
