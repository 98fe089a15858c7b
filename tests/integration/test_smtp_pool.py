"""The SMTP pool: mails that arrive, and connections that are kept."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from typing import Any

import pytest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.dispatcher.smtp import Envelope, GivenBackError, SmtpPool
from outbox_server.services.dispatcher.smtp.lease import Lease
from outbox_server.shared.states import AttemptOutcome
from tests.eventually import eventually
from tests.smtp_pools import (
    MAIL,
    endpoint_of,
    open_connections,
    pool_of,
    send,
    send_leased,
)
from tests.smtp_servers import (
    Close,
    Say,
    ScriptedServer,
    Succeed,
    Wait,
)

SENT = AttemptOutcome.SENT
TEMPORARY = AttemptOutcome.TEMPORARY_FAILURE
PERMANENT = AttemptOutcome.PERMANENT_FAILURE
CONNECTION = AttemptOutcome.CONNECTION_FAILURE
IN_DOUBT = AttemptOutcome.IN_DOUBT


# Without failures ----------------------------------------------------------------------------


async def test_a_mail_arrives_byte_by_byte(pool: SmtpPool, inbox: Inbox) -> None:
    began = time.monotonic()
    result = await send(pool, inbox)

    assert (result.outcome, result.smtp_code, result.enhanced_code) == (SENT, 250, "2.0.0")
    assert result.body_begun
    assert began <= result.started <= result.ended <= time.monotonic()
    mail = inbox.mails[0]
    assert (mail.mail_from, mail.rcpt_tos) == ("a@x.test", ("b@y.test",))
    assert (inbox.maildir / "new" / mail.file).read_bytes() == MAIL.data


@pytest.mark.parametrize(
    "body",
    [
        b".\r\n",
        b"..\r\n.a\r\nb.\r\n.\r\n",
        b"\r\n.\r\n\r\n..\r\n",
        b"x\n.\n.y\r\n",  # not a line break in SMTP, and must not be treated as one
        b"",
        b"\xff\x00\xe9\r\n",
    ],
)
async def test_dots_are_doubled_and_nothing_else_changes(pool: SmtpPool, body: bytes) -> None:
    data = b"Subject: s\r\n\r\n" + body
    async with ScriptedServer() as server:
        result = await send(pool, server, replace(MAIL, data=data))
        again = await send(pool, server)

    assert (result.outcome, again.outcome) == (SENT, SENT)
    seen = b"\n".join(line.removeprefix(b".") for line in server.taken[0].data.split(b"\n"))
    assert seen == data
    assert server.taken[1].data == MAIL.data


async def test_a_body_that_begins_with_a_dot_is_one_mail(pool: SmtpPool) -> None:
    async with ScriptedServer() as server:
        result = await send(pool, server, Envelope("a@x.test", "b@y.test", b".\r\nQUIT\r\n", False))

    assert result.outcome is SENT
    assert [mail.data for mail in server.taken] == [b"..\r\nQUIT\r\n"]


async def test_a_line_of_a_megabyte_is_sent_unchanged(pool: SmtpPool) -> None:
    data = b"Subject: s\r\n\r\n" + b"x" * 1_000_000 + b"\r\n"
    async with ScriptedServer() as server:
        result = await send(pool, server, replace(MAIL, data=data))

    assert result.outcome is SENT
    assert server.taken[0].data == data


async def test_replies_that_arrive_byte_by_byte_are_read(pool: SmtpPool) -> None:
    refusal = Say("450-4.2.0 try\r\n450 4.2.0 later")
    async with ScriptedServer({"rcpt": [refusal]}, byte_by_byte=True) as server:
        result = await send(pool, server)
        assert (await send(pool, server)).outcome is SENT

    assert (result.outcome, result.smtp_code, result.enhanced_code) == (TEMPORARY, 450, "4.2.0")
    assert result.message == "4.2.0 try\n4.2.0 later"


async def test_a_server_that_knows_only_helo_gets_its_mail(pool: SmtpPool) -> None:
    plan = [Say("502 5.5.1 what?"), Say("250 scripted.test")]
    async with ScriptedServer({"ehlo": plan}) as server:
        assert (await send(pool, server)).outcome is SENT

    assert server.commands[:2] == ["EHLO client.test", "HELO client.test"]


async def test_a_forwarded_recipient_is_accepted(pool: SmtpPool) -> None:
    async with ScriptedServer({"rcpt": Say("251 2.1.5 will forward")}) as server:
        assert (await send(pool, server)).outcome is SENT


@pytest.mark.parametrize("code", [250, 252, 259])
async def test_any_2xx_reply_after_the_body_is_an_acceptance(pool: SmtpPool, code: int) -> None:
    """RFC 5321, 4.2.1: the first digit decides about success, even of an unknown code."""
    async with ScriptedServer({"body": Say(f"{code} 2.0.0 queued")}) as server:
        result = await send(pool, server)

    assert (result.outcome, result.smtp_code) == (SENT, code)


# Kept connections ----------------------------------------------------------------------------


async def test_connections_are_kept_and_reused(pool: SmtpPool) -> None:
    async with ScriptedServer() as server:
        for _ in range(5):
            assert (await send(pool, server)).outcome is SENT

        assert server.connections == 1
        assert server.visits["ehlo"] == 1
        assert len(server.taken) == 5
        assert open_connections(pool) == 1


async def test_the_pool_opens_no_more_connections_than_its_size(pool: SmtpPool) -> None:
    gate = asyncio.Event()
    async with ScriptedServer({"mail": (Wait(gate), Succeed())}) as server:
        pool = pool_of(size=3, timeout=5.0)
        sends = [asyncio.create_task(send(pool, server)) for _ in range(9)]
        await eventually(lambda: server.waiting["mail"] == 3)
        gate.set()
        results = await asyncio.gather(*sends)
        await pool.close()

        assert {result.outcome for result in results} == {SENT}
        assert server.connections == 3
        assert len(server.taken) == 9


async def test_a_connection_is_reused_after_a_refused_mail(pool: SmtpPool) -> None:
    async with ScriptedServer({"rcpt": [Say("550 5.1.1 nobody")]}) as server:
        assert (await send(pool, server)).outcome is PERMANENT
        assert (await send(pool, server)).outcome is SENT

        assert server.connections == 1
        assert server.visits["rset"] == 1


async def test_a_connection_closed_while_idle_costs_no_attempt(pool: SmtpPool) -> None:
    async with ScriptedServer() as server:
        await send(pool, server)
        server.cut()
        await eventually(lambda: not server.open)
        result = await send(pool, server)

        assert result.outcome is SENT
        assert len(server.taken) == 2
        assert open_connections(pool) == 1


@pytest.mark.parametrize(
    "goodbye", [Close(), Say("421 4.4.2 idle for too long"), (Say("421 4.4.2 bye"), Close())]
)
async def test_a_kept_connection_that_ends_at_the_next_mail_costs_no_attempt(
    pool: SmtpPool, goodbye: Any
) -> None:
    async with ScriptedServer({"mail": [Succeed(), goodbye]}) as server:
        await send(pool, server)
        result = await send(pool, server)

        assert result.outcome is SENT
        assert server.connections == 2
        assert open_connections(pool) == 1


async def test_all_kept_connections_may_be_dead_at_the_same_time() -> None:
    pool = pool_of(timeout=5.0)
    gate = asyncio.Event()
    async with ScriptedServer({"mail": [(Wait(gate), Succeed())] * 4}) as server:
        first = [asyncio.create_task(send(pool, server)) for _ in range(4)]
        await eventually(lambda: server.waiting["mail"] == 4)
        gate.set()
        await asyncio.gather(*first)
        server.cut()
        # No code runs between the cut and the next mail, so the pool has not noticed the end.
        result = await send(pool, server)

        assert result.outcome is SENT
        pool.close_idle()
        assert open_connections(pool) == 1
    await pool.close()


async def test_a_new_connection_that_is_closed_at_once_is_a_failure(pool: SmtpPool) -> None:
    async with ScriptedServer({"mail": Close()}) as server:
        result = await send(pool, server)

        assert result.outcome is CONNECTION
        assert server.connections == 1
        assert open_connections(pool) == 0


async def test_a_connection_idle_for_too_long_is_not_reused() -> None:
    pool = pool_of(idle=0.0)
    async with ScriptedServer() as server:
        await send(pool, server)
        await send(pool, server)

        assert server.connections == 2
        pool.close_idle()
        await eventually(lambda: not server.open)
        assert open_connections(pool) == 0


async def test_closing_the_pool_closes_its_connections(pool: SmtpPool) -> None:
    async with ScriptedServer() as server:
        await send(pool, server)
        await pool.close()

        await eventually(lambda: not server.open)
        assert open_connections(pool) == 0


# Sends that do not begin ---------------------------------------------------------------------


async def test_a_send_that_may_not_begin_opens_no_connection(pool: SmtpPool) -> None:
    async with ScriptedServer() as server:
        with pytest.raises(GivenBackError):
            await send(pool, server, may_begin=lambda: False)
        with pytest.raises(GivenBackError):
            await send(pool, server, within=-0.001)

        assert server.connections == 0
    assert open_connections(pool) == 0


async def test_a_send_stopped_after_354_never_reaches_the_server(pool: SmtpPool) -> None:
    gate = asyncio.Event()
    async with ScriptedServer({"data": (Wait(gate), Succeed())}) as server:
        sending = asyncio.create_task(
            send(pool, server, may_begin=lambda: server.visits["data"] == 0)
        )
        await eventually(lambda: server.waiting["data"] == 1)
        gate.set()
        with pytest.raises(GivenBackError):
            await sending
        await eventually(lambda: not server.open)

    assert (server.taken, server.body_bytes) == ([], 0)
    assert open_connections(pool) == 0


async def test_no_body_begins_after_the_lease_expired_while_the_process_was_paused() -> None:
    """As after SIGSTOP: 354 has arrived, but no code ran before the deadline passed."""
    pool = pool_of(timeout=20.0)
    gate = asyncio.Event()
    async with ScriptedServer({"data": (Wait(gate), Succeed())}) as server:
        lease = Lease(time.monotonic() + 60)
        sending = asyncio.create_task(send_leased(pool, endpoint_of(server), lease=lease))
        await eventually(lambda: server.waiting["data"] == 1)
        lease.extend(time.monotonic() + 0.05)
        gate.set()
        while lease.holds:  # the event loop is blocked
            pass
        with contextlib.suppress(GivenBackError):
            result = await sending
            assert (result.outcome, result.body_begun) == (CONNECTION, False)
        await eventually(lambda: not server.open)

    assert (server.taken, server.body_bytes) == ([], 0)
    assert open_connections(pool) == 0


async def test_a_send_that_is_cancelled_leaves_no_connection(pool: SmtpPool) -> None:
    async with ScriptedServer({"rcpt": Wait()}) as server:
        sending = asyncio.create_task(send(pool, server))
        await eventually(lambda: server.waiting["rcpt"] == 1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending

        await eventually(lambda: not server.open)
        assert open_connections(pool) == 0


# SMTPUTF8 ------------------------------------------------------------------------------------

INTERNATIONAL = Envelope("jürgen@x.test", "名@y.test", "Subject: ü\r\n\r\nHi\r\n".encode(), True)


async def test_smtputf8_is_requested_only_when_needed(pool: SmtpPool) -> None:
    async with ScriptedServer() as server:
        assert (await send(pool, server, INTERNATIONAL)).outcome is SENT
        assert (await send(pool, server)).outcome is SENT

    mails = [command for command in server.commands if command.startswith("MAIL")]
    assert mails == ["MAIL FROM:<jürgen@x.test> SMTPUTF8 BODY=8BITMIME", "MAIL FROM:<a@x.test>"]
    assert server.taken[0].rcpt_to == "名@y.test"


async def test_a_mail_that_needs_smtputf8_fails_alone_if_the_server_lacks_it(
    pool: SmtpPool,
) -> None:
    async with ScriptedServer(extensions=["8BITMIME"]) as server:
        result = await send(pool, server, INTERNATIONAL)

        assert (result.outcome, result.enhanced_code) == (PERMANENT, "5.6.7")
        assert not result.body_begun
        assert server.visits["mail"] == 0
        assert (await send(pool, server)).outcome is SENT
        assert server.connections == 1


async def test_mails_with_different_circuits_share_no_connection(pool: SmtpPool) -> None:
    """The circuit stands for the user and the credentials."""
    async with ScriptedServer() as server:
        for circuit in ("of ann", "of eve", "of ann"):
            assert (await send(pool, endpoint_of(server, circuit=circuit))).outcome is SENT
        assert server.connections == 2
