"""Mails that an SMTP server refuses, and servers that die or stop answering."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
import uvloop

from outbox_server.deploy.ports import free_port
from outbox_server.services.dispatcher.smtp import SmtpPool, session
from outbox_server.services.dispatcher.smtp.lease import Lease
from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.smtp.limits import PhaseLimits
from outbox_server.shared.states import AttemptOutcome, SmtpSecurity
from tests.eventually import PATIENCE, eventually
from tests.smtp_pools import (
    LIMIT,
    MAIL,
    all_closed,
    endpoint_of,
    open_connections,
    pool_of,
    send,
    send_leased,
)
from tests.smtp_servers import (
    Close,
    Conversation,
    Say,
    ScriptedServer,
    StopReading,
    Succeed,
    Wait,
)

SENT = AttemptOutcome.SENT
TEMPORARY = AttemptOutcome.TEMPORARY_FAILURE
PERMANENT = AttemptOutcome.PERMANENT_FAILURE
CONNECTION = AttemptOutcome.CONNECTION_FAILURE
IN_DOUBT = AttemptOutcome.IN_DOUBT
BEFORE_THE_BODY = ("mail", "rcpt", "data")
OPENING = ("greeting", "ehlo", *BEFORE_THE_BODY)


# Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [*BEFORE_THE_BODY, "body"])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("450 4.2.1 busy", (TEMPORARY, 450, "4.2.1")),
        ("452 disk full", (TEMPORARY, 452, None)),
        ("550 5.6.0 no", (PERMANENT, 550, "5.6.0")),
        ("552 5.3.4 too big", (PERMANENT, 552, "5.3.4")),
        ("554-5.6.0 no\r\n554 5.6.0 never", (PERMANENT, 554, "5.6.0")),
        ("421 4.3.2 closing", (CONNECTION, 421, "4.3.2")),
        ("530 5.7.0 authenticate first", (CONNECTION, 530, "5.7.0")),
    ],
)
async def test_the_code_of_a_refusal_decides_its_outcome(
    pool: SmtpPool, phase: str, answer: str, expected: tuple[AttemptOutcome, int, str | None]
) -> None:
    async with ScriptedServer({phase: [Say(answer)]}) as server:
        result = await send(pool, server)

        assert (result.outcome, result.smtp_code, result.enhanced_code) == expected
        assert result.message is not None
        assert result.message.endswith(answer.rpartition("\n")[2][4:])
        assert result.body_begun == (phase == "body")
        # No refusal affects the next mail.
        assert (await send(pool, server)).outcome is SENT
        assert open_connections(pool) == 1


@pytest.mark.parametrize("phase", ["greeting", "ehlo"])
@pytest.mark.parametrize("answer", ["421 4.3.2 closing", "554 5.7.1 not you", "450 4.7.1 later"])
async def test_a_server_that_refuses_the_session_does_not_refuse_the_mail(
    pool: SmtpPool, phase: str, answer: str
) -> None:
    async with ScriptedServer({phase: Say(answer)}) as server:
        result = await send(pool, server)

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert result.smtp_code == int(answer[:3])
        assert server.visits["mail"] == 0
        await all_closed(pool)


async def test_a_port_without_a_listener_is_a_connection_failure(pool: SmtpPool) -> None:
    port = free_port()
    result = await send(pool, Endpoint("127.0.0.1", port, SmtpSecurity.NONE))

    assert (result.outcome, result.body_begun) == (CONNECTION, False)
    state = pool.states()[0]
    assert (state.port, state.connection_count) == (port, 0)
    assert state.last_error == result.message
    assert state.last_error_at == pytest.approx(time.time(), abs=5)


async def test_a_name_that_does_not_resolve_is_a_connection_failure(pool: SmtpPool) -> None:
    result = await send(pool, Endpoint("no-such-host.invalid", 25, SmtpSecurity.NONE))

    assert (result.outcome, result.body_begun) == (CONNECTION, False)


@pytest.mark.parametrize(
    "answer",
    [
        b"hello",
        b"",
        b"25",
        b"x250 ok",
        b"\xff\xfe\x00",
        b"999 what",
        b"250" + b"x" * 40_000,
        b"250-" + b"x" * 1_000_000,
    ],
)
@pytest.mark.parametrize("phase", ["mail", "body"])
async def test_an_answer_that_is_not_smtp_is_a_connection_failure(
    short_pool: SmtpPool, phase: str, answer: bytes
) -> None:
    async with ScriptedServer({phase: [Say(answer)]}) as server:
        result = await send(short_pool, server)

        assert result.outcome is (IN_DOUBT if phase == "body" else CONNECTION)
        result_text = (result.message or "").encode()
        assert b"\x00" not in result_text
        assert len(result_text) <= 2_000
        # The connection is closed: no one could tell to which mail its next reply belongs.
        assert open_connections(short_pool) == 0
        assert (await send(short_pool, server)).outcome is SENT


# Death and silence ---------------------------------------------------------------------------


@pytest.mark.parametrize("phase", OPENING)
async def test_a_connection_that_dies_before_the_body_leaves_no_doubt(
    pool: SmtpPool, phase: str
) -> None:
    async with ScriptedServer({phase: Close()}) as server:
        result = await send(pool, server)

    assert (result.outcome, result.body_begun) == (CONNECTION, False)
    assert open_connections(pool) == 0
    assert server.body_bytes == 0


async def test_a_connection_that_dies_after_the_body_leaves_the_mail_in_doubt(
    pool: SmtpPool,
) -> None:
    async with ScriptedServer({"body": Close()}) as server:
        result = await send(pool, server)

    assert (result.outcome, result.body_begun) == (IN_DOUBT, True)
    assert result.smtp_code is None
    assert open_connections(pool) == 0


@pytest.mark.parametrize("phase", OPENING)
async def test_a_server_that_hangs_before_the_body_times_out(
    short_pool: SmtpPool, phase: str
) -> None:
    async with ScriptedServer({phase: Wait()}) as server:
        began = time.monotonic()
        result = await send(short_pool, server)

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        # The limit of the phase, not the lease of 30 s.
        assert LIMIT <= time.monotonic() - began < 30
        assert open_connections(short_pool) == 0
        await eventually(lambda: not server.open)


async def test_a_server_that_hangs_after_the_body_leaves_the_mail_in_doubt() -> None:
    pool = pool_of(limits=replace(PhaseLimits.of(PATIENCE), end=LIMIT))
    async with ScriptedServer({"body": Wait()}) as server:
        began = time.monotonic()
        result = await send(pool, server)

        assert (result.outcome, result.body_begun) == (IN_DOUBT, True)
        # The limit of the phase, not the lease of 30 s.
        assert LIMIT <= time.monotonic() - began < 30
        assert open_connections(pool) == 0
        await eventually(lambda: not server.open)
    await pool.close()


async def test_a_server_that_is_slow_in_every_phase_times_out(short_pool: SmtpPool) -> None:
    """Each reply comes within its limit, but together they would exceed the lease."""

    def slowly() -> Any:
        event = asyncio.Event()
        asyncio.get_running_loop().call_later(0.8 * LIMIT, event.set)
        return (Wait(event), Succeed())

    class Slow(ScriptedServer):
        def _action(self, phase: str, _: Conversation) -> Any:
            return slowly() if phase != "quit" else (Succeed(),)

    async with Slow() as server:
        result = await send(short_pool, server, within=3 * LIMIT)

    assert (result.outcome, result.body_begun) == (CONNECTION, False)
    assert server.body_bytes == 0


async def test_a_silent_server_does_not_hold_a_mail_beyond_the_lease() -> None:
    pool = pool_of(timeout=3600.0)
    async with ScriptedServer({"rcpt": [Wait()], "body": [Wait()]}) as server:
        began = time.monotonic()
        before = await send(pool, server, within=LIMIT)
        lease = Lease(time.monotonic() + 60)
        sending = asyncio.create_task(send_leased(pool, endpoint_of(server), lease=lease))
        await eventually(lambda: server.waiting["body"] == 1)
        lease.extend(time.monotonic() + LIMIT)
        after = await sending

        assert (before.outcome, before.body_begun) == (CONNECTION, False)
        assert (after.outcome, after.body_begun) == (IN_DOUBT, True)
        assert time.monotonic() - began < 3600


async def test_a_server_that_hangs_at_rset_does_not_delay_the_outcome(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "_RESET_LIMIT_S", LIMIT)
    pool = pool_of(timeout=20.0)
    async with ScriptedServer({"rcpt": [Say("550 5.1.1 nobody")], "rset": Wait()}) as server:
        result = await send(pool, server)
        assert (result.outcome, result.smtp_code) == (PERMANENT, 550)

        # The next mail is not affected either.
        assert (await send(pool, server)).outcome is SENT
        assert (server.connections, server.visits["rset"]) == (2, 1)
        await eventually(lambda: open_connections(pool) == 1)
    await pool.close()


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_data_that_a_server_did_not_read_is_not_sent_after_the_deadline(loop_factory: Any) -> None:
    """The rest of a body must not be sent later, nor hold a socket forever."""
    data = b"Subject: s\r\n\r\n" + b"line\r\n" * 3_000_000

    async def scenario() -> None:
        limits = replace(PhaseLimits.of(PATIENCE), block=LIMIT)
        pool, unread = pool_of(limits=limits), asyncio.Event()
        async with ScriptedServer({"data": (Succeed(), StopReading(unread))}) as server:
            result = await send(pool, server, replace(MAIL, data=data))
            # The end of the body was never written, so the server cannot have accepted the mail.
            assert (result.outcome, result.body_begun) == (CONNECTION, True)
            unread.set()
            await eventually(lambda: not server.open)

        assert server.taken == []
        assert server.body_bytes < len(data)

    # uvloop and the standard library: their transports have no common base class.
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(scenario())
