"""Refusals of one user's calls, which come at a limited rate."""

from __future__ import annotations

import asyncio

import pytest

from outbox_server.shared.fair_shares import Claimant
from outbox_server.shared.rpc import refusals
from outbox_server.shared.rpc.refusals import RefusalRate
from tests.eventually import PATIENCE

ANN = Claimant("ann")
EVE = Claimant("eve")
AT_ONCE = 3


@pytest.fixture
def rate(monkeypatch: pytest.MonkeyPatch) -> RefusalRate:
    """Let refusals wait for an hour, and four of them at a time."""
    for name, value in (("_AT_ONCE", AT_ONCE), ("_EVERY_S", 3600.0), ("_WAITING", 4)):
        monkeypatch.setattr(refusals, name, value)
    return RefusalRate()


async def come_at_once(rate: RefusalRate, claimant: Claimant, count: int = 1) -> None:
    async with asyncio.timeout(PATIENCE):
        for _ in range(count):
            await rate.wait(claimant)


async def waiting(rate: RefusalRate, count: int) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(rate.wait(EVE)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_after_the_first_refusals_of_a_user_each_one_waits(rate: RefusalRate) -> None:
    await come_at_once(rate, EVE, AT_ONCE)
    tasks = await waiting(rate, 2)
    assert not any(task.done() for task in tasks)
    # Nobody else waits.
    await come_at_once(rate, ANN, AT_ONCE)
    await come_at_once(rate, Claimant("key", "operator key", privileged=True), AT_ONCE + 1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not rate._waiting.in_use


async def test_refusals_beyond_the_places_come_at_once(rate: RefusalRate) -> None:
    await come_at_once(rate, EVE, AT_ONCE)
    tasks = await waiting(rate, 3)
    await come_at_once(rate, EVE)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_each_refusal_comes_in_its_time(
    rate: RefusalRate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "_EVERY_S", 0.01)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await come_at_once(rate, EVE, AT_ONCE + 5)
    assert loop.time() - began >= 0.05 - 0.001  # the resolution of timers


async def test_users_without_refusals_are_forgotten(
    rate: RefusalRate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "_EVERY_S", 0.0)
    monkeypatch.setattr(refusals, "_USERS", 2)
    for number in range(10):
        await come_at_once(rate, Claimant(f"user{number}"))
    assert len(rate._due) <= 2
