"""Servers that enforce a limit without naming it in a reply."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from outbox_server.services.dispatcher.smtp import SmtpPool
from outbox_server.shared.smtp.limits import PhaseLimits
from outbox_server.shared.states import AttemptOutcome, ReplyClass
from tests.clock import Clock
from tests.eventually import PATIENCE, eventually
from tests.smtp_pools import LIMIT, all_closed, pool_of, send
from tests.smtp_servers import (
    Action,
    Close,
    CrowdedServer,
    Say,
    ScriptedServer,
    Succeed,
    Wait,
)

SENT = AttemptOutcome.SENT


async def send_beside(pool: SmtpPool, server: ScriptedServer) -> Any:
    """Send one mail, and a second one while the first is in its body."""
    gate = asyncio.Event()
    server.plan["body"] = [(Wait(gate), Succeed())]
    first = asyncio.create_task(send(pool, server))
    await eventually(lambda: server.waiting["body"] == 1)
    second = await send(pool, server)
    gate.set()
    assert (await first).outcome is SENT
    return second


def shown(value: object) -> str:
    """Return a part of a test id that is the same in every process."""
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize(
    ("phase", "action"),
    [
        ("greeting", Close()),
        ("ehlo", Close()),
        ("mail", Close()),
        ("greeting", Wait()),
        ("greeting", Say("what")),
    ],
    ids=shown,
)
async def test_a_new_connection_that_fails_while_others_work_exceeds_the_servers_limit(
    phase: str, action: Action
) -> None:
    pool = pool_of(limits=replace(PhaseLimits.of(5.0), greeting=LIMIT))
    async with CrowdedServer(1, phase, action) as server:
        assert (await send(pool, server)).outcome is SENT
        result = await send_beside(pool, server)

        assert result.outcome is AttemptOutcome.TEMPORARY_FAILURE
        assert result.reply_class is ReplyClass.CONNECTIONS
        assert "other connections to the server work" in result.message
        assert pool.states()[0].connection_cap == 1
        # The other mails wait for the connection that works.
        results = await asyncio.gather(*(send(pool, server) for _ in range(5)))
        assert {result.outcome for result in results} == {SENT}
        assert server.refused == 1
    await pool.close()


@pytest.mark.parametrize(
    ("phase", "reply"),
    [("greeting", "421 no"), ("greeting", "554 no"), ("ehlo", "450 no"), ("mail", "451 no")],
)
async def test_an_unexplained_refusal_while_other_connections_work_lowers_the_cap(
    phase: str, reply: str
) -> None:
    clock = Clock()
    pool = pool_of(timeout=5.0, clock=clock, idle=10_000.0, connection_age=10_000.0)
    async with CrowdedServer(1, phase, Say(reply)) as server:
        assert (await send(pool, server)).outcome is SENT
        assert (await send_beside(pool, server)).outcome is not SENT

        assert pool.states()[0].connection_cap == 1
        # No reply named a limit, so the next try comes sooner than if one had.
        clock.now += 61
        assert pool.states()[0].connection_cap == 2
    await pool.close()


async def test_a_connection_that_fails_while_no_other_works_is_a_connection_failure() -> None:
    pool = pool_of()
    async with ScriptedServer({"greeting": Close()}) as server:
        result = await send(pool, server)

        assert result.outcome is AttemptOutcome.CONNECTION_FAILURE
        assert result.reply_class is None
        assert pool.states()[0].connection_cap == 5
    await pool.close()


async def test_a_connection_that_fails_beside_an_unused_one_is_a_connection_failure() -> None:
    pool = pool_of()
    async with CrowdedServer(1, "greeting", Close()) as server:
        result = await send_beside(pool, server)

        assert result.outcome is AttemptOutcome.CONNECTION_FAILURE
    await pool.close()


@pytest.mark.parametrize("action", [Wait(), Say("what")], ids=shown)
@pytest.mark.parametrize("phase", ["mail", "rcpt", "data"])
async def test_a_kept_connection_that_has_died_is_replaced_before_the_body(
    phase: str, action: Action
) -> None:
    # The first mail must pass the phase within its limit as well.
    limit = 1.0 if isinstance(action, Wait) else PATIENCE
    pool = pool_of(limits=replace(PhaseLimits.of(PATIENCE), **{phase: limit}))
    async with ScriptedServer({phase: [Succeed(), action]}) as server:
        assert (await send(pool, server)).outcome is SENT
        assert (await send(pool, server)).outcome is SENT
        assert server.connections == 2
        assert len(server.taken) == 2
    await pool.close()


@pytest.mark.parametrize("action", [Wait(), Close(), Say("what")], ids=shown)
async def test_pipelining_is_not_used_again_after_it_failed(action: Action) -> None:
    clock = Clock()
    pool = pool_of(limits=replace(PhaseLimits.of(PATIENCE), rcpt=LIMIT), clock=clock)
    async with ScriptedServer({"rcpt": [action]}, extensions=("PIPELINING",)) as server:
        assert (await send(pool, server)).outcome is AttemptOutcome.CONNECTION_FAILURE
        server.plan["mail"] = Say("550 5.7.1 no")
        server.commands.clear()
        await send(pool, server)
        await send(pool, server)
        # Commands are sent one at a time: RCPT and DATA do not follow a refused MAIL.
        assert not {"RCPT", "DATA"} & {command[:4] for command in server.commands}

        clock.now += 3601
        await send(pool, server)
        assert "DATA" in server.commands
    await pool.close()


async def test_pauses_grow_while_every_connection_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This also holds if the server refuses at MAIL, as Exchange Online does."""
    monkeypatch.setattr("outbox_server.services.dispatcher.smtp.endpoint_pool._FIRST_PAUSE_S", 0.05)
    pool = pool_of(timeout=5.0)
    refused = Say("432 4.3.2 Concurrent connections limit exceeded")
    async with ScriptedServer({"mail": [refused] * 5}) as server:
        for _ in range(6):
            result = await send(pool, server)
        assert result.outcome is SENT
        waits = [later - earlier for earlier, later in pairwise(server.began)]
        # Each pause is a minimum, on a machine of any speed.
        pauses = [0.05, 0.1, 0.2, 0.4, 0.8]
        assert all(wait >= pause for wait, pause in zip(waits, pauses, strict=True))
    await pool.close()


async def test_connections_refused_at_the_same_time_raise_the_pause_once() -> None:
    clock, gate = Clock(), asyncio.Event()
    pool = pool_of(timeout=5.0, clock=clock)
    refused = Say("421 4.7.0 too many concurrent connections")
    async with ScriptedServer({"greeting": [(Wait(gate), refused)] * 5}) as server:
        sends = [asyncio.create_task(send(pool, server)) for _ in range(5)]
        await eventually(lambda: server.waiting["greeting"] == 5)
        gate.set()
        results = await asyncio.gather(*sends)
        assert {result.reply_class for result in results} == {ReplyClass.CONNECTIONS}
        await all_closed(pool)

        clock.now += 1.0
        assert (await send(pool, server, within=5.0)).outcome is SENT
    await pool.close()
