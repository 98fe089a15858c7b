"""The number of connections that a mail server permits at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from outbox_server.services.dispatcher.smtp import GivenBackError, SmtpPool
from outbox_server.services.dispatcher.smtp.lease import Lease
from outbox_server.shared.states import AttemptOutcome, ReplyClass
from tests.clock import Clock
from tests.eventually import eventually
from tests.smtp_pools import (
    LIMIT,
    pool_of,
    send,
)
from tests.smtp_servers import CrowdedServer, Say, ScriptedServer, Succeed, Wait

SENT = AttemptOutcome.SENT
PIPELINING = ("8BITMIME", "PIPELINING")


@pytest.fixture
async def pool() -> AsyncIterator[SmtpPool]:
    pool = pool_of(timeout=5.0)
    yield pool
    await pool.close()


# CONNECTIONS ---------------------------------------------------------------------------------


TOO_MANY = Say("421 4.7.0 too many concurrent connections")


async def test_connections_drop_to_the_number_that_worked_and_rise_one_by_one() -> None:
    clock, gate = Clock(), asyncio.Event()
    pool = pool_of(timeout=5.0, clock=clock, size=5, idle=10_000.0, connection_age=10_000.0)
    async with CrowdedServer(2, "greeting", TOO_MANY, mail=(Wait(gate), Succeed())) as server:
        first = [asyncio.create_task(send(pool, server)) for _ in range(2)]
        await eventually(lambda: server.waiting["mail"] == 2)
        result = await send(pool, server)
        assert result.reply_class is ReplyClass.CONNECTIONS
        assert result.outcome is AttemptOutcome.TEMPORARY_FAILURE
        assert pool.states()[0].connection_cap == 2

        # The others wait for the connections that work.
        others = [asyncio.create_task(send(pool, server)) for _ in range(4)]
        gate.set()
        results = await asyncio.gather(*first, *others)
        assert {result.outcome for result in results} == {SENT}
        assert (server.refused, server.most_open) == (1, 3)

        for cap in (3, 4, 5, 5):
            clock.now += 601
            assert pool.states()[0].connection_cap == cap
    await pool.close()


async def test_a_refused_first_connection_is_retried_after_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("outbox_server.services.dispatcher.smtp.endpoint_pool._FIRST_PAUSE_S", 0.05)
    pool = pool_of(timeout=5.0)
    async with CrowdedServer(0, "greeting", TOO_MANY) as server:
        for _ in range(3):
            assert (await send(pool, server)).reply_class is ReplyClass.CONNECTIONS
        server.most = 1
        assert (await send(pool, server)).outcome is SENT
        assert server.refused == 3
        assert pool.states()[0].connection_cap == 1
    await pool.close()


@pytest.mark.parametrize("ending", ["lease", "cancel"])
async def test_a_mail_that_no_longer_waits_takes_no_connection_from_others(ending: str) -> None:
    clock, gate = Clock(), asyncio.Event()
    pool = pool_of(timeout=5.0, size=1, clock=clock)
    async with ScriptedServer({"mail": [(Wait(gate), Succeed())]}) as server:
        first = asyncio.create_task(send(pool, server))
        await eventually(lambda: server.waiting["mail"] == 1)
        gone = asyncio.create_task(send(pool, server, within=LIMIT if ending == "lease" else 30))
        if ending == "cancel":
            await eventually(lambda: len(waiting_in(pool)) == 1)
            gone.cancel()
        with pytest.raises((GivenBackError, asyncio.CancelledError)):
            await gone
        assert waiting_in(pool) == []
        gate.set()
        assert (await first).outcome is SENT
        assert (await send(pool, server)).outcome is SENT
        assert server.connections == 1
    await pool.close()


def waiting_in(pool: SmtpPool) -> list[Any]:
    (only,) = pool._pools.values()
    return list(only._waiters)


async def test_the_slot_of_a_connection_that_died_is_reused_once() -> None:
    pool = pool_of(timeout=5.0, size=1)
    async with ScriptedServer() as server:
        await send(pool, server)
        (only,) = pool._pools.values()
        lease, places = Lease(time.monotonic() + 30), list[Any]()
        for _ in range(2):
            only.acquire(lease, places.append)
        (session,) = places
        server.cut()
        await eventually(lambda: not session.stream.connected)
        only.hand_back(session)
        assert places == [session, None]
        assert only.open_count == 1
        only.drop(None)
    await pool.close()


async def test_a_mail_that_waits_for_a_connection_is_given_back_at_a_drain() -> None:
    pool, gate = pool_of(timeout=5.0, size=1), asyncio.Event()
    draining: list[bool] = []
    async with ScriptedServer({"mail": (Wait(gate), Succeed())}) as server:
        first = asyncio.create_task(send(pool, server))
        await eventually(lambda: server.waiting["mail"] == 1)
        may_begin: Callable[[], bool] = lambda: not draining  # noqa: E731
        waiting = asyncio.create_task(send(pool, server, may_begin=may_begin))
        short = asyncio.create_task(send(pool, server, within=LIMIT))
        with pytest.raises(GivenBackError):
            await short
        assert not waiting.done()
        draining.append(True)
        pool.give_up_waiting()
        with pytest.raises(GivenBackError):
            await waiting
        gate.set()
        assert (await first).outcome is SENT
        assert server.connections == 1
    await pool.close()
