"""MAIL, RCPT and DATA in one write, and the replies of servers to it."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
import uvloop

from outbox_server.deploy.certificates import self_signed, server_context
from outbox_server.services.dispatcher.smtp import GivenBackError, SmtpPool
from outbox_server.services.dispatcher.smtp.lease import Lease
from outbox_server.shared.states import AttemptOutcome, ReplyClass, SmtpSecurity
from tests.eventually import eventually
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
from tests.smtp_servers import Close, Say, ScriptedServer, StopReading, Succeed, Wait

SENT = AttemptOutcome.SENT
CONNECTION = AttemptOutcome.CONNECTION_FAILURE
IN_DOUBT = AttemptOutcome.IN_DOUBT
PIPELINING = ("8BITMIME", "PIPELINING")
LARGE = replace(MAIL, data=b"Subject: s\r\n\r\n" + b".line of a large mail\r\n" * 200_000)
ACCEPTED = b"250 ok\r\n250 ok\r\n354 go\r\n"
LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


@pytest.fixture
async def pool() -> AsyncIterator[SmtpPool]:
    pool = pool_of(timeout=5.0)
    yield pool
    await pool.close()


class OneSegment:
    """A server that reads MAIL, RCPT and DATA together and answers them in one write.

    `early` is its reply within a body; after it the server reads nothing.
    """

    def __init__(self, replies: bytes, early: bytes = b"") -> None:
        self._replies = replies
        self._early = early
        self._over = asyncio.Event()
        self.heard: list[bytes] = []
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self._over.set()
        await self._server.wait_closed()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 one.test\r\n")
        await reader.readline()
        writer.write(b"250-one.test\r\n250 PIPELINING\r\n")
        while heard := await reader.read(65_536):
            self.heard.append(heard)
            if heard.startswith(b"MAIL"):
                writer.write(self._replies)
            elif self._early:
                writer.write(self._early)
                await self._over.wait()
                break
            else:
                writer.write(b"250 ok\r\n")
        writer.close()


async def test_three_commands_go_in_one_write_and_their_replies_come_in_one_segment(
    pool: SmtpPool,
) -> None:
    async with OneSegment(b"250 ok\r\n\r\n250-one\r\n250 two\r\n354 go\r\n") as server:
        assert (await send(pool, endpoint_of(server))).outcome is SENT
        assert server.heard[0] == b"MAIL FROM:<a@x.test>\r\nRCPT TO:<b@y.test>\r\nDATA\r\n"
        assert server.heard[1] == MAIL.data + b".\r\n"
        await pool.close()


@pytest.mark.parametrize(
    "replies", [b"250 ok\r\n250 ok\r\n354 go\r\n250 again\r\n", b"250 ok\r\n" * 40]
)
async def test_an_unexpected_extra_reply_is_a_connection_failure_and_sends_no_mail(
    pool: SmtpPool, replies: bytes
) -> None:
    async with OneSegment(replies) as server:
        result = await send(pool, endpoint_of(server))
        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert len(server.heard) == 1
        assert open_connections(pool) == 0


async def test_commands_are_sent_one_by_one_if_pipelining_is_not_offered(pool: SmtpPool) -> None:
    async with ScriptedServer({"mail": [Say("550 5.7.1 no")]}) as server:
        await send(pool, server)
        assert (server.visits["rcpt"], server.visits["data"]) == (0, 0)


@pytest.mark.parametrize(
    ("refusals", "code"),
    [
        ({"mail": "550 5.6.0 no"}, 550),
        ({"rcpt": "551 5.1.1 nobody"}, 551),
        ({"data": "554 5.7.1 no"}, 554),
    ],
)
async def test_the_first_refusal_decides_and_the_next_mail_is_sent(
    pool: SmtpPool, refusals: dict[str, str], code: int
) -> None:
    plan = {phase: [Say(text)] for phase, text in refusals.items()}
    async with ScriptedServer(plan, extensions=PIPELINING) as server:
        result = await send(pool, server)
        assert (result.outcome, result.smtp_code) == (AttemptOutcome.PERMANENT_FAILURE, code)
        assert not result.body_begun
        assert (await send(pool, server)).outcome is SENT
        assert (server.connections, len(server.taken)) == (1, 1)


# RCPT is refused, but DATA gets 354 ----------------------------------------------------------


@pytest.mark.parametrize("end", [Say("554 5.5.1 no valid recipients"), Succeed(), Close(), Wait()])
async def test_a_lone_dot_is_sent_if_data_is_accepted_for_a_refused_recipient(
    pool: SmtpPool, end: Any
) -> None:
    """The server's reply to the dot is not a reply to the mail."""
    plan = {"rcpt": [Say("550 5.1.1 nobody")], "body": [end]}
    async with ScriptedServer(plan, extensions=PIPELINING, careless=True) as server:
        result = await send(pool, server)
        assert (result.outcome, result.smtp_code) == (AttemptOutcome.PERMANENT_FAILURE, 550)
        assert not result.body_begun
        await all_closed(pool)
        await eventually(lambda: not server.open)
        assert [mail.data for mail in server.taken] == [b""]
        assert server.body_bytes == 0
        assert server.endings == ["close" if isinstance(end, Close | Wait) else "QUIT"]
        assert (await send(pool, server)).outcome is SENT


async def test_no_dot_is_sent_if_the_sender_is_refused_and_the_recipient_accepted(
    pool: SmtpPool,
) -> None:
    """The dot would be an empty mail to that recipient."""
    plan = {"mail": [Say("452 4.3.2 too many")]}
    async with ScriptedServer(plan, extensions=PIPELINING, careless=True) as server:
        result = await send(pool, server)
        assert (result.smtp_code, result.body_begun) == (452, False)
        await eventually(lambda: not server.open)
        # No QUIT is sent either, since it would be a line of the body.
        assert (server.taken, server.body_bytes, server.endings) == ([], 0, ["close"])


# The last check before the body --------------------------------------------------------------


async def test_a_send_stopped_after_354_never_reaches_the_server(pool: SmtpPool) -> None:
    async with ScriptedServer(extensions=PIPELINING) as server:
        with pytest.raises(GivenBackError):
            await send(pool, server, may_begin=lambda: server.visits["data"] == 0)
        await eventually(lambda: not server.open)
        assert (server.taken, server.body_bytes, server.endings) == ([], 0, ["close"])
        assert open_connections(pool) == 0


async def test_no_body_begins_if_the_lease_ends_at_354(pool: SmtpPool) -> None:
    lease = Lease(time.monotonic() + 60)

    def may_begin() -> bool:
        if server.visits["data"]:
            lease.extend(time.monotonic())
        return True

    async with ScriptedServer(extensions=PIPELINING) as server:
        with pytest.raises(GivenBackError):
            await send_leased(pool, endpoint_of(server), lease=lease, may_begin=may_begin)
        await eventually(lambda: not server.open)
        assert (server.taken, server.body_bytes, server.endings) == ([], 0, ["close"])


# Connections that die ------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["mail", "rcpt", "data"])
@pytest.mark.parametrize("partial", [b"", b"25", b"250-2.1.0 o"])
async def test_a_connection_that_dies_before_the_body_leaves_no_doubt(
    pool: SmtpPool, phase: str, partial: bytes
) -> None:
    steps = (Say(partial), Close()) if partial else (Close(),)
    async with ScriptedServer({phase: steps}, extensions=PIPELINING) as server:
        result = await send(pool, server)
        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert open_connections(pool) == 0


@pytest.mark.parametrize("phase", ["mail", "rcpt", "data"])
async def test_a_kept_connection_that_dies_at_the_next_mail_costs_no_attempt(
    pool: SmtpPool, phase: str
) -> None:
    async with ScriptedServer({phase: [Succeed(), Close()]}, extensions=PIPELINING) as server:
        await send(pool, server)
        assert (await send(pool, server)).outcome is SENT
        assert (server.connections, len(server.taken)) == (2, 2)


# Bodies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("security", [SmtpSecurity.NONE, SmtpSecurity.STARTTLS, SmtpSecurity.TLS])
def test_a_large_mail_arrives_complete(
    loop_factory: Any, security: SmtpSecurity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        pool, tls = pool_of(timeout=20.0), context_of(security, tmp_path, monkeypatch)
        implicit = security is SmtpSecurity.TLS
        async with ScriptedServer(tls=tls, implicit_tls=implicit, extensions=PIPELINING) as server:
            for mail in (MAIL, LARGE, MAIL):
                result = await send(pool, endpoint_of(server, security=security), mail)
                assert result.outcome is SENT, result.message
            assert server.connections == 1
            assert server.taken[1].data == LARGE.data.replace(b"\n.", b"\n..")
            await pool.close()
            await eventually(lambda: not server.open)
            assert server.endings == ["QUIT"]

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(scenario())


def context_of(
    security: SmtpSecurity, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> ssl.SSLContext | None:
    if security is SmtpSecurity.NONE:
        return None
    certificate = self_signed(folder)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.public))
    return server_context(certificate)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_a_refusal_before_the_end_of_the_body_is_honoured(loop_factory: Any) -> None:
    async def scenario() -> None:
        pool = pool_of(timeout=20.0)
        async with OneSegment(ACCEPTED, b"552 5.3.4 that is enough\r\n") as server:
            result = await send(pool, endpoint_of(server), LARGE)
            assert (result.smtp_code, result.enhanced_code) == (552, "5.3.4")
            assert result.reply_class is ReplyClass.CONTENT
            assert (result.outcome, result.body_begun) == (AttemptOutcome.PERMANENT_FAILURE, True)
            await all_closed(pool)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(scenario())


async def test_an_acceptance_before_the_end_of_the_body_is_ignored() -> None:
    pool = pool_of(timeout=20.0)
    async with OneSegment(ACCEPTED, b"250 thanks\r\n") as server:
        result = await send(pool, endpoint_of(server), LARGE)
        assert (result.outcome, result.reply_class) == (CONNECTION, None)
        assert open_connections(pool) == 0


async def test_a_server_that_accepts_no_more_of_a_body_cannot_have_accepted_the_mail() -> None:
    pool = pool_of(timeout=LIMIT)
    async with ScriptedServer(
        {"data": (Succeed(), StopReading())}, extensions=PIPELINING
    ) as server:
        result = await send(pool, server, LARGE)
        assert (result.outcome, result.body_begun) == (CONNECTION, True)
        assert "accepts no more" in (result.message or "")
        assert open_connections(pool) == 0


async def test_a_connection_lost_after_the_whole_body_leaves_the_mail_in_doubt() -> None:
    """The kernel has the whole body; how much of it the server has is unknown."""
    pool = pool_of(timeout=LIMIT)
    async with ScriptedServer(
        {"data": (Succeed(), StopReading())}, extensions=PIPELINING
    ) as server:
        result = await send(pool, server)
        assert (result.outcome, result.body_begun) == (IN_DOUBT, True)


async def test_a_connection_cut_within_a_body_leaves_no_doubt(pool: SmtpPool) -> None:
    unread = asyncio.Event()
    plan = {"data": (Succeed(), StopReading(unread))}
    async with ScriptedServer(plan, extensions=PIPELINING) as server:
        sending = asyncio.create_task(send(pool, server, LARGE))
        await eventually(lambda: server.waiting["data"] == 1)
        server.cut()
        result = await sending
        unread.set()
        assert (result.outcome, result.body_begun) == (CONNECTION, True)
        assert open_connections(pool) == 0
