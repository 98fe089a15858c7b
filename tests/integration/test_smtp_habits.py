"""Common behaviour of real mail servers: it loses no mail and makes no copies."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from outbox_server.services.dispatcher.smtp import GivenBackError, SendResult, SmtpPool
from outbox_server.services.dispatcher.smtp.lease import Lease
from outbox_server.shared.smtp.limits import PhaseLimits
from outbox_server.shared.smtp.stream import SmtpStream
from outbox_server.shared.states import AttemptOutcome, ReplyClass
from tests.clock import Clock
from tests.eventually import PATIENCE, eventually
from tests.smtp_pools import (
    LIMIT,
    MAIL,
    all_closed,
    endpoint_of,
    open_connections,
    pool_of,
    relay_at,
    send,
    send_leased,
)
from tests.smtp_servers import Close, Conversation, Habit, Say, ScriptedServer, Succeed, Wait

SENT = AttemptOutcome.SENT
CONNECTION = AttemptOutcome.CONNECTION_FAILURE
PIPELINING = ("8BITMIME", "PIPELINING")
PHASES = ("greeting", "ehlo", "mail", "rcpt", "data", "body")


@pytest.fixture(params=[(), PIPELINING], ids=["in_sequence", "pipelined"])
def extensions(request: pytest.FixtureRequest) -> tuple[str, ...]:
    found: tuple[str, ...] = request.param
    return found


@pytest.fixture
async def pool() -> AsyncIterator[SmtpPool]:
    pool = pool_of(timeout=5.0)
    yield pool
    await pool.close()


def after(mails: int, answer: str) -> Habit:
    """Return a plan that refuses every mail of a connection after the first `mails`."""
    return lambda heard: Say(answer) if heard.begun > mails else Succeed()


async def send_many(pool: SmtpPool, server: ScriptedServer, count: int) -> list[SendResult]:
    return [await send(pool, server, replace(MAIL, rcpt_to=f"r{n}@y.test")) for n in range(count)]


def accepted(server: ScriptedServer) -> Counter[str]:
    return Counter(mail.rcpt_to for mail in server.taken if mail.answered)


def once_each(count: int) -> dict[str, int]:
    return {f"r{n}@y.test": 1 for n in range(count)}


# A connection that carries no further mail ---------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "mails", "answer"),
    [
        ("mail", 5, "452 4.3.2 too many mails on this connection"),
        ("mail", 5, "421 4.7.0 too many messages in this session"),
        ("mail", 1, "503 5.5.1 bad sequence of commands"),
        ("rcpt", 5, "452 4.5.3 too many recipients"),
        ("data", 5, "421 4.7.0 enough"),
        ("body", 5, "451 Mails per session limit exceeded"),
        ("body", 5, "421 4.3.2 closing"),
    ],
)
async def test_a_server_that_limits_mails_per_connection_gets_all_mails(
    pool: SmtpPool, extensions: tuple[str, ...], phase: str, mails: int, answer: str
) -> None:
    plan = {phase: after(mails, answer)}
    async with ScriptedServer(plan, extensions=extensions) as server:
        results = await send_many(pool, server, 20)

        assert {result.outcome for result in results} == {SENT}
        assert {result.reply_class for result in results} == {ReplyClass.SENT}
        assert accepted(server) == once_each(20)
        assert server.connections == 20 // mails
        # One refusal was enough: the pool now knows how many mails a connection carries.
        assert server.visits["mail"] == 21
        assert pool.states()[0].learned_mails_per_connection == mails
        await pool.close()
        await eventually(lambda: not server.open)
        assert server.endings == ["QUIT"] * server.connections


async def test_a_learned_number_of_mails_is_forgotten_after_an_hour() -> None:
    clock = Clock()
    pool = pool_of(timeout=5.0, clock=clock, idle=10_000.0, connection_age=10_000.0)
    async with ScriptedServer({"mail": after(2, "421 4.7.0 enough")}) as server:
        await send_many(pool, server, 6)
        assert pool.states()[0].learned_mails_per_connection == 2
        clock.now += 3_601
        assert pool.states()[0].learned_mails_per_connection is None
        server.plan.clear()
        before = server.connections
        await send_many(pool, server, 10)
        assert server.connections <= before + 1
    await pool.close()


async def test_a_refusal_after_idling_sets_no_limit_of_mails_per_connection() -> None:
    """The server closed the connection because of its age, not the number of its mails."""
    clock = Clock()
    pool = pool_of(timeout=5.0, clock=clock)
    plan = {"mail": [Succeed(), Say("421 4.4.2 idle for too long")]}
    async with ScriptedServer(plan) as server:
        await send(pool, server)
        clock.now += 15
        assert (await send(pool, server)).outcome is SENT
        assert pool.states()[0].learned_mails_per_connection is None
    await pool.close()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("452 4.5.0 not now", ReplyClass.TEMPORARY),
        ("421 4.3.2 closing", ReplyClass.SESSION),
        ("550 5.4.5 daily quota", ReplyClass.ACCOUNT),
    ],
)
async def test_a_refusal_that_repeats_on_a_new_connection_is_taken_literally(
    pool: SmtpPool, answer: str, expected: ReplyClass
) -> None:
    plan = {"mail": [Succeed(), Say("421 4.3.2 enough"), Say(answer), Succeed()]}
    async with ScriptedServer(plan) as server:
        assert (await send(pool, server)).outcome is SENT
        result = await send(pool, server)

        assert (result.reply_class, result.smtp_code) == (expected, int(answer[:3]))
        assert result.outcome is (
            CONNECTION if expected is ReplyClass.SESSION else AttemptOutcome.TEMPORARY_FAILURE
        )
        assert server.connections == 2
        assert pool.states()[0].learned_mails_per_connection is None


async def test_the_old_connection_is_closed_before_the_new_one_is_opened() -> None:
    """A server that allows one connection would refuse a second one."""

    def slowly(_: Conversation) -> Any:
        answered = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, answered.set)
        return (Wait(answered), Succeed())

    pool = pool_of(timeout=5.0, size=1)
    plan = {"mail": after(1, "421 4.7.0 enough"), "quit": slowly}
    async with ScriptedServer(plan) as server:
        await send_many(pool, server, 5)
        assert server.most_open == 1
        assert accepted(server) == once_each(5)
    await pool.close()


async def test_the_last_check_is_repeated_before_a_body_is_sent_again(pool: SmtpPool) -> None:
    """In this case the refusal of the body is the outcome: the server has seen the body."""
    plan = {"body": [Succeed(), Say("451 mails per session limit exceeded")]}
    async with ScriptedServer(plan) as server:
        await send(pool, server)
        result = await send(pool, server, may_begin=lambda: server.visits["body"] < 2)

        assert (result.reply_class, result.body_begun) == (ReplyClass.SESSION, True)
        assert (server.connections, len(server.taken)) == (1, 2)


async def test_a_mail_whose_connection_is_used_up_is_given_back_if_it_must_not_begin(
    pool: SmtpPool,
) -> None:
    plan = {"mail": [Succeed(), Say("421 4.7.0 enough")]}
    async with ScriptedServer(plan) as server:
        await send(pool, server)
        with pytest.raises(GivenBackError):
            await send(pool, server, may_begin=lambda: server.visits["mail"] < 2)
        await all_closed(pool)


async def test_an_unsolicited_reply_is_attributed_to_no_mail(
    pool: SmtpPool, extensions: tuple[str, ...]
) -> None:
    """For example a 421 directly after the last mail, before the server closes the connection."""
    plan = {"body": [(Succeed(), Say("421 4.7.0 enough, good-bye")), Succeed()]}
    async with ScriptedServer(plan, extensions=extensions) as server:
        results = await send_many(pool, server, 2)

        assert [result.smtp_code for result in results] == [250, 250]
        assert Counter(mail.rcpt_to for mail in server.taken) == once_each(2)
        assert (server.connections, server.visits["mail"]) == (2, 2)


# Reuse of a connection after a refusal -------------------------------------------------------


@pytest.mark.parametrize("phase", ["mail", "rcpt", "data", "body"])
@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("450 4.2.1 busy", False),
        ("452 4.3.1 disk full", False),
        ("503 5.5.1 bad sequence", False),
        ("530 5.7.0 authenticate first", False),
        ("550 5.1.1 nobody", True),
        ("554 5.7.1 spam", True),
    ],
)
async def test_a_connection_is_used_again_after_a_refusal_of_the_mail_alone(
    pool: SmtpPool, extensions: tuple[str, ...], phase: str, answer: str, kept: bool
) -> None:
    async with ScriptedServer({phase: [Say(answer)]}, extensions=extensions) as server:
        assert (await send(pool, server)).smtp_code == int(answer[:3])
        assert (await send(pool, server)).outcome is SENT

        # MAIL names only the sender, so a refusal there concerns the account and not the mail.
        kept = kept and phase != "mail"
        verbs = [command.split()[0] for command in server.commands]
        assert verbs.count("RSET" if kept else "QUIT") == 1
        assert server.connections == (1 if kept else 2)


@pytest.mark.parametrize("goodbye", [Say("421 4.3.2 bye"), Say("500 what?"), Close(), Wait()])
async def test_the_outcome_does_not_depend_on_the_reply_to_rset(
    goodbye: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox_server.services.dispatcher.smtp.session._RESET_LIMIT_S", LIMIT)
    pool = pool_of(timeout=5.0)
    plan = {"rcpt": [Say("550 5.1.1 nobody")], "rset": goodbye}
    async with ScriptedServer(plan) as server:
        assert (await send(pool, server)).smtp_code == 550
        assert (await send(pool, server)).outcome is SENT
        assert (server.connections, len(server.taken)) == (2, 1)
    await pool.close()


# A late reply --------------------------------------------------------------------------------


async def test_a_late_reply_is_awaited_while_the_lease_is_renewed(
    extensions: tuple[str, ...],
) -> None:
    pool, gate = pool_of(timeout=20.0), asyncio.Event()
    plan = {"body": (Wait(gate), Succeed())}
    async with ScriptedServer(plan, extensions=extensions) as server:
        lease = Lease(time.monotonic() + 60)
        sending = asyncio.create_task(send_leased(pool, endpoint_of(server), lease=lease))
        await eventually(lambda: server.waiting["body"] == 1)
        # Without a turn of the event loop between, so that the first end cannot pass before it
        # moves.
        lease.extend(time.monotonic() + LIMIT)
        ended = lease.until
        lease.extend(time.monotonic() + 60)
        await eventually(lambda: time.monotonic() > ended + LIMIT)
        assert not sending.done()
        gate.set()
        assert (await sending).outcome is SENT
        assert len(server.taken) == 1
    await pool.close()


async def test_a_lost_lease_ends_the_wait_at_once() -> None:
    pool = pool_of(timeout=60.0)
    async with ScriptedServer({"body": Wait()}) as server:
        lease = Lease(time.monotonic() + 60)
        sending = asyncio.create_task(send_leased(pool, endpoint_of(server), lease=lease))
        await eventually(lambda: server.waiting["body"] == 1)
        lease.extend(time.monotonic())
        result = await asyncio.wait_for(sending, 10)
        assert (result.outcome, result.body_begun) == (AttemptOutcome.IN_DOUBT, True)
        assert "in time" in (result.message or "")
    await pool.close()


async def test_a_silent_connection_is_probed_by_the_kernel(
    pool: SmtpPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a NAT drops the connection, and the reply to an accepted mail is lost."""
    opened: list[SmtpStream] = []
    made = SmtpStream.connection_made

    def note(stream: SmtpStream, transport: asyncio.BaseTransport) -> None:
        opened.append(stream)
        made(stream, transport)

    monkeypatch.setattr(SmtpStream, "connection_made", note)
    async with ScriptedServer() as server:
        await send(pool, server)
        connection = opened[0].transport.get_extra_info("socket")
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


@pytest.mark.parametrize("phase", PHASES)
async def test_each_phase_has_its_own_limit(phase: str, extensions: tuple[str, ...]) -> None:
    """The limits of all other phases are an hour."""
    field = {"body": "end"}.get(phase, phase)
    limits = replace(PhaseLimits.of(3_600.0), **{field: LIMIT})
    pool = pool_of(limits=limits)
    async with ScriptedServer({phase: Wait()}, extensions=extensions) as server:
        result = await asyncio.wait_for(send(pool, server), 20)
        in_doubt = phase == "body"
        assert result.outcome is (AttemptOutcome.IN_DOUBT if in_doubt else CONNECTION)
        assert "in time" in (result.message or "")
        assert result.reply_class is None
        assert open_connections(pool) == 0
    await pool.close()


# Blank lines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [*PHASES, "quit", "rset"])
@pytest.mark.parametrize("blank", [b"", b"\r\n\r\n", b"  \t"])
async def test_blank_lines_before_a_reply_are_skipped(
    pool: SmtpPool, phase: str, blank: bytes, extensions: tuple[str, ...]
) -> None:
    def habit(heard: Conversation) -> Any:
        del heard
        return (Say(blank), Succeed())

    plan = {phase: habit} | ({"rcpt": [Say("550 5.1.1 nobody")]} if phase == "rset" else {})
    async with ScriptedServer(plan, extensions=extensions) as server:
        results = await send_many(pool, server, 3)
        await pool.close()
        await eventually(lambda: not server.open)

    assert [result.outcome for result in results[1:]] == [SENT, SENT]
    assert server.connections == 1
    assert server.endings == ["QUIT"]


# QUIT ----------------------------------------------------------------------------------------


async def ended(server: ScriptedServer) -> list[str]:
    await eventually(lambda: not server.open)
    return server.endings


async def test_an_idle_connection_ends_with_quit() -> None:
    clock = Clock()
    pool = pool_of(timeout=5.0, clock=clock, idle=30.0)
    async with ScriptedServer() as server:
        await send(pool, server)
        clock.now += 31
        pool.close_idle()
        assert await ended(server) == ["QUIT"]
        await all_closed(pool)


async def test_a_connection_ends_with_quit_after_its_mails() -> None:
    pool = pool_of(timeout=5.0, mails_per_connection=3)
    async with ScriptedServer() as server:
        await send_many(pool, server, 6)
        assert server.connections == 2
        assert await ended(server) == ["QUIT", "QUIT"]
    await pool.close()


async def test_a_connection_ends_with_quit_at_its_maximum_age() -> None:
    clock = Clock()
    pool = pool_of(timeout=5.0, clock=clock, connection_age=60.0, idle=1_000.0)
    async with ScriptedServer() as server:
        for seconds in (0, 40, 40):
            clock.now += seconds
            await send(pool, server)
        assert server.connections == 2
        await eventually(lambda: server.endings == ["QUIT"])
    await pool.close()


async def test_closing_the_pool_sends_quit_on_all_connections_at_once() -> None:
    pool, gate = pool_of(timeout=5.0), asyncio.Event()
    async with ScriptedServer({"mail": (Wait(gate), Succeed())}) as server:
        sends = [asyncio.create_task(send(pool, server)) for _ in range(4)]
        await eventually(lambda: server.waiting["mail"] == 4)
        gate.set()
        await asyncio.gather(*sends)
        await pool.close()
        assert await ended(server) == ["QUIT"] * 4


async def test_a_server_that_does_not_answer_quit_delays_no_outcome_and_no_shutdown() -> None:
    pool = pool_of(timeout=3600.0)
    plan = {"quit": Wait(), "rcpt": [Say("450 4.2.1 busy")] * 5}
    async with ScriptedServer(plan) as server:
        sends = [asyncio.create_task(send(pool, server)) for _ in range(5)]
        assert {result.smtp_code for result in await asyncio.gather(*sends)} == {450}
        assert open_connections(pool) == 5
        closing = asyncio.create_task(pool.close())
        # All connections at the same time; each takes two seconds.
        await eventually(lambda: server.waiting["quit"] == 5)
        async with asyncio.timeout(PATIENCE):
            await closing
        assert open_connections(pool) == 0


async def test_a_mail_that_ends_after_the_pool_was_closed_ends_its_connection(
    pool: SmtpPool,
) -> None:
    gate = asyncio.Event()
    async with ScriptedServer({"body": (Wait(gate), Succeed())}) as server:
        sending = asyncio.create_task(send(pool, server))
        await eventually(lambda: server.waiting["body"] == 1)
        await pool.close()
        gate.set()
        assert (await sending).outcome is SENT
        assert await ended(server) == ["QUIT"]


@pytest.mark.parametrize("phase", ["greeting", "ehlo"])
async def test_a_server_that_refuses_the_session_receives_quit(pool: SmtpPool, phase: str) -> None:
    async with ScriptedServer({phase: Say("554 5.7.1 not you")}) as server:
        assert (await send(pool, server)).outcome is CONNECTION
        assert await ended(server) == ["QUIT"]


async def test_a_connection_used_up_by_a_refused_mail_ends_with_rset_and_quit() -> None:
    pool = pool_of(timeout=5.0, mails_per_connection=1)
    async with ScriptedServer({"rcpt": Say("550 5.1.1 nobody")}) as server:
        await send(pool, server)
        assert await ended(server) == ["QUIT"]
        assert [command[:4] for command in server.commands[-2:]] == ["RSET", "QUIT"]
    await pool.close()


@pytest.mark.parametrize(
    ("plan", "extensions"),
    [
        ({"greeting": Say("354 go")}, ()),
        ({"ehlo": Say("354 go")}, ()),
        ({"auth": Say("334 not base64!")}, ("AUTH CRAM-MD5",)),
        ({"auth": Say("250 welcome")}, ("AUTH PLAIN",)),
        ({"mail": Say("354 go")}, ()),
        ({"rcpt": Say("354 go")}, ()),
        ({"data": Say("250 go")}, ()),
        ({"body": Say("354 more")}, ()),
    ],
)
async def test_a_reply_to_another_command_is_not_an_acceptance(
    pool: SmtpPool, plan: dict[str, Any], extensions: tuple[str, ...]
) -> None:
    async with ScriptedServer(plan, extensions=extensions) as server:
        signed_in = {"username": "anna", "password": "s3cret-word"} if "auth" in plan else {}
        result = await send(pool, relay_at(server, **signed_in))
        in_doubt = "body" in plan
        assert result.outcome is (AttemptOutcome.IN_DOUBT if in_doubt else CONNECTION)
        assert (result.smtp_code, result.reply_class) == (None, None)
        await all_closed(pool)


# EHLO ----------------------------------------------------------------------------------------


def fully_qualified(heard: Conversation) -> Any:
    if "." in heard.helo:
        return Succeed()
    return Say(f"504 5.5.2 <{heard.helo}>: need fully-qualified hostname")


@pytest.mark.parametrize(("helo", "said"), [("", "[127.0.0.1]"), ("mail.x.test", "mail.x.test")])
async def test_a_server_that_requires_a_fully_qualified_name_gets_one(helo: str, said: str) -> None:
    pool = pool_of(timeout=5.0, helo=helo)
    async with ScriptedServer({"rcpt": fully_qualified}) as server:
        assert (await send(pool, server)).outcome is SENT
        assert server.commands[0] == f"EHLO {said}"
    await pool.close()


# SIZE ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["", "0", "1000", "x", "9" * 30])
async def test_the_size_of_a_mail_is_declared_if_the_server_offers_size(
    pool: SmtpPool, limit: str
) -> None:
    async with ScriptedServer(extensions=[f"SIZE {limit}".strip()]) as server:
        assert (await send(pool, server)).outcome is SENT
        assert f"MAIL FROM:<a@x.test> SIZE={len(MAIL.data)}" in server.commands


async def test_a_mail_that_is_too_large_for_the_server_is_refused_before_mail(
    pool: SmtpPool,
) -> None:
    most = len(MAIL.data)
    async with ScriptedServer(extensions=[f"SIZE {most}"]) as server:
        large = replace(MAIL, data=MAIL.data + b"x\r\n")
        for _ in range(2):
            result = await send(pool, server, large)
            assert result.outcome is AttemptOutcome.PERMANENT_FAILURE
            assert (result.smtp_code, result.enhanced_code) == (552, "5.3.4")
            assert result.reply_class is ReplyClass.CONTENT
            assert not result.body_begun
            for size in (most, most + 3):
                assert str(size) in (result.message or "")
        assert server.visits["mail"] == 0
        assert (await send(pool, server)).outcome is SENT
        assert server.connections == 1
