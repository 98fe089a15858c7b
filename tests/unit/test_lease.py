"""The time until which a send may continue."""

from __future__ import annotations

import asyncio
import time

import pytest

from outbox_server.services.dispatcher.smtp.lease import Lease
from outbox_server.shared.smtp.limits import FixedDeadline
from tests.eventually import eventually


async def test_a_renewal_extends_a_wait() -> None:
    lease = Lease(time.monotonic() + 0.05)
    async with lease.limit(60):
        first = lease.until
        lease.extend(time.monotonic() + 60)
        await eventually(lambda: time.monotonic() > first + 0.05)


async def test_a_renewal_does_not_move_the_waits_own_limit() -> None:
    lease = Lease(time.monotonic() + 0.05)
    asyncio.get_running_loop().call_soon(lambda: lease.extend(time.monotonic() + 60))
    with pytest.raises(TimeoutError):
        async with lease.limit(0.1):
            await asyncio.Event().wait()


def test_watchers_are_notified_of_an_earlier_end() -> None:
    lease, heard = Lease(1_000.0), list[float]()

    def watcher() -> None:
        heard.append(lease.until)

    lease.watch(watcher)
    lease.extend(1_500.0)
    lease.extend(1_200.0)
    lease.extend(1_200.0)
    lease.unwatch(watcher)
    lease.extend(1_000.0)
    assert heard == [1_200.0]


async def test_a_fixed_deadline_bounds_every_wait() -> None:
    deadline = FixedDeadline(0.05)
    with pytest.raises(TimeoutError):
        async with deadline.limit(60):
            await asyncio.Event().wait()
    with pytest.raises(TimeoutError):
        async with FixedDeadline(60).limit(0.05):
            await asyncio.Event().wait()
