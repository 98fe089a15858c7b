"""The SMTP pool against servers that do, in each phase, what a bad day has them do."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import uvloop

from deploy.local.certificates import self_signed, server_context
from deploy.local.inbox import Inbox
from deploy.local.ports import free_port
from services.dispatcher.lease import Lease
from services.dispatcher.smtp import Envelope, GivenBackError, SmtpPool, session
from services.dispatcher.smtp import pool as pools
from shared.egress import Egress
from shared.smtp.endpoint import Endpoint
from shared.states import AttemptOutcome, SmtpSecurity
from tests.eventually import eventually
from tests.smtp_pools import (
    LIMIT,
    MAIL,
    all_closed,
    endpoint_of,
    open_connections,
    pool_of,
    relay_at,
    send,
)
from tests.smtp_servers import (
    Close,
    Conversation,
    Say,
    ScriptedServer,
    StopReading,
    Wait,
    Well,
    plain_login,
)

SENT = AttemptOutcome.SENT
TEMPORARY = AttemptOutcome.TEMPORARY_FAILURE
PERMANENT = AttemptOutcome.PERMANENT_FAILURE
CONNECTION = AttemptOutcome.CONNECTION_FAILURE
IN_DOUBT = AttemptOutcome.IN_DOUBT
BEFORE_THE_BODY = ("mail", "rcpt", "data")
OPENING = ("greeting", "ehlo", *BEFORE_THE_BODY)


@pytest.fixture
async def pool() -> AsyncIterator[SmtpPool]:
    pool = pool_of()
    yield pool
    await pool.close()


# When all is well ----------------------------------------------------------------------------


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
        b"x\n.\n.y\r\n",  # no line break of SMTP, and not to be taken for one
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


async def test_a_line_of_a_megabyte_is_sent_as_it_is(pool: SmtpPool) -> None:
    data = b"Subject: s\r\n\r\n" + b"x" * 1_000_000 + b"\r\n"
    async with ScriptedServer() as server:
        result = await send(pool, server, replace(MAIL, data=data))

    assert result.outcome is SENT
    assert server.taken[0].data == data


async def test_answers_that_come_byte_by_byte_are_understood(pool: SmtpPool) -> None:
    refusal = Say("450-4.2.0 try\r\n450 4.2.0 later")
    async with ScriptedServer({"rcpt": [refusal]}, byte_by_byte=True) as server:
        result = await send(pool, server)
        assert (await send(pool, server)).outcome is SENT

    assert (result.outcome, result.smtp_code, result.enhanced_code) == (TEMPORARY, 450, "4.2.0")
    assert result.message == "4.2.0 try\n4.2.0 later"


async def test_a_server_that_knows_helo_alone_gets_its_mail(pool: SmtpPool) -> None:
    plan = [Say("502 5.5.1 what?"), Say("250 scripted.test")]
    async with ScriptedServer({"ehlo": plan}) as server:
        assert (await send(pool, server)).outcome is SENT

    assert server.commands[:2] == ["EHLO client.test", "HELO client.test"]


async def test_a_forwarded_recipient_is_accepted(pool: SmtpPool) -> None:
    async with ScriptedServer({"rcpt": Say("251 2.1.5 will forward")}) as server:
        assert (await send(pool, server)).outcome is SENT


@pytest.mark.parametrize("code", [250, 252, 259])
async def test_any_completion_after_the_body_is_one(pool: SmtpPool, code: int) -> None:
    """RFC 5321, 4.2.1: the first digit says whether it is good, also of an unknown code."""
    async with ScriptedServer({"body": Say(f"{code} 2.0.0 queued")}) as server:
        result = await send(pool, server)

    assert (result.outcome, result.smtp_code) == (SENT, code)


# Kept connections ----------------------------------------------------------------------------


async def test_connections_are_kept_and_used_again(pool: SmtpPool) -> None:
    async with ScriptedServer() as server:
        for _ in range(5):
            assert (await send(pool, server)).outcome is SENT

        assert server.connections == 1
        assert server.visits["ehlo"] == 1
        assert len(server.taken) == 5
        assert open_connections(pool) == 1


async def test_no_more_connections_than_the_pool_has(pool: SmtpPool) -> None:
    gate = asyncio.Event()
    async with ScriptedServer({"mail": (Wait(gate), Well())}) as server:
        pool = pool_of(size=3, timeout=5.0)
        sends = [asyncio.create_task(send(pool, server)) for _ in range(9)]
        await eventually(lambda: server.waiting["mail"] == 3)
        gate.set()
        results = await asyncio.gather(*sends)
        await pool.close()

        assert {result.outcome for result in results} == {SENT}
        assert server.connections == 3
        assert len(server.taken) == 9


async def test_a_refused_mail_leaves_its_connection_of_use(pool: SmtpPool) -> None:
    async with ScriptedServer({"rcpt": [Say("550 5.1.1 nobody")]}) as server:
        assert (await send(pool, server)).outcome is PERMANENT
        assert (await send(pool, server)).outcome is SENT

        assert server.connections == 1
        assert server.visits["rset"] == 1


async def test_a_connection_that_was_closed_while_idle_costs_nothing(pool: SmtpPool) -> None:
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
async def test_a_kept_connection_that_ends_at_the_next_mail_costs_nothing(
    pool: SmtpPool, goodbye: Any
) -> None:
    async with ScriptedServer({"mail": [Well(), goodbye]}) as server:
        await send(pool, server)
        result = await send(pool, server)

        assert result.outcome is SENT
        assert server.connections == 2
        assert open_connections(pool) == 1


async def test_all_kept_connections_may_be_dead_at_once() -> None:
    pool = pool_of(timeout=5.0)
    gate = asyncio.Event()
    async with ScriptedServer({"mail": [(Wait(gate), Well())] * 4}) as server:
        first = [asyncio.create_task(send(pool, server)) for _ in range(4)]
        await eventually(lambda: server.waiting["mail"] == 4)
        gate.set()
        await asyncio.gather(*first)
        server.cut()
        # Nothing runs between the cut and the next mail: no end was seen yet.
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


async def test_a_connection_that_was_idle_for_too_long_is_not_used_again() -> None:
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
async def test_a_refusal_says_by_its_code_what_it_is(
    pool: SmtpPool, phase: str, answer: str, expected: tuple[AttemptOutcome, int, str | None]
) -> None:
    async with ScriptedServer({phase: [Say(answer)]}) as server:
        result = await send(pool, server)

        assert (result.outcome, result.smtp_code, result.enhanced_code) == expected
        assert result.message is not None
        assert result.message.endswith(answer.rpartition("\n")[2][4:])
        assert result.body_begun == (phase == "body")
        # Whatever it was, the next mail is not concerned.
        assert (await send(pool, server)).outcome is SENT
        assert open_connections(pool) == 1


@pytest.mark.parametrize("phase", ["greeting", "ehlo"])
@pytest.mark.parametrize("answer", ["421 4.3.2 closing", "554 5.7.1 not you", "450 4.7.1 later"])
async def test_a_server_that_refuses_us_is_not_a_mail_that_is_refused(
    pool: SmtpPool, phase: str, answer: str
) -> None:
    async with ScriptedServer({phase: Say(answer)}) as server:
        result = await send(pool, server)

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert result.smtp_code == int(answer[:3])
        assert server.visits["mail"] == 0
        await all_closed(pool)


async def test_nobody_listens(pool: SmtpPool) -> None:
    port = free_port()
    result = await send(pool, Endpoint("127.0.0.1", port, SmtpSecurity.NONE))

    assert (result.outcome, result.body_begun) == (CONNECTION, False)
    state = pool.states()[0]
    assert (state.port, state.connection_count) == (port, 0)
    assert state.last_error == result.message
    assert state.last_error_at == pytest.approx(time.time(), abs=5)


async def test_a_name_that_does_not_resolve(pool: SmtpPool) -> None:
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
async def test_an_answer_that_is_no_smtp_is_trouble_with_the_connection(
    pool: SmtpPool, phase: str, answer: bytes
) -> None:
    async with ScriptedServer({phase: [Say(answer)]}) as server:
        result = await send(pool, server)

        assert result.outcome is (IN_DOUBT if phase == "body" else CONNECTION)
        result_text = (result.message or "").encode()
        assert b"\x00" not in result_text
        assert len(result_text) <= 2_000
        # It is not known what that server says next, and to which mail.
        assert open_connections(pool) == 0
        assert (await send(pool, server)).outcome is SENT


# Death and silence ---------------------------------------------------------------------------


@pytest.mark.parametrize("phase", OPENING)
async def test_a_connection_that_dies_before_the_body_is_no_doubt(
    pool: SmtpPool, phase: str
) -> None:
    async with ScriptedServer({phase: Close()}) as server:
        result = await send(pool, server)

    assert (result.outcome, result.body_begun) == (CONNECTION, False)
    assert open_connections(pool) == 0
    assert server.body_bytes == 0


async def test_a_connection_that_dies_after_the_body_is_a_doubt(pool: SmtpPool) -> None:
    async with ScriptedServer({"body": Close()}) as server:
        result = await send(pool, server)

    assert (result.outcome, result.body_begun) == (IN_DOUBT, True)
    assert result.smtp_code is None
    assert open_connections(pool) == 0


@pytest.mark.parametrize("phase", OPENING)
async def test_a_server_that_hangs_before_the_body_is_given_up(pool: SmtpPool, phase: str) -> None:
    async with ScriptedServer({phase: Wait()}) as server:
        began = time.monotonic()
        result = await send(pool, server)

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert LIMIT <= time.monotonic() - began < 3 * LIMIT + 1
        assert open_connections(pool) == 0
        await eventually(lambda: not server.open)


async def test_a_server_that_hangs_after_the_body_is_a_doubt(pool: SmtpPool) -> None:
    async with ScriptedServer({"body": Wait()}) as server:
        began = time.monotonic()
        result = await send(pool, server)

        assert (result.outcome, result.body_begun) == (IN_DOUBT, True)
        assert LIMIT <= time.monotonic() - began < LIMIT + 1
        assert open_connections(pool) == 0
        await eventually(lambda: not server.open)


async def test_a_server_that_is_slow_in_every_phase_is_given_up(pool: SmtpPool) -> None:
    """Each answer comes within its limit; together they would take the lease."""

    def slowly() -> Any:
        event = asyncio.Event()
        asyncio.get_running_loop().call_later(0.8 * LIMIT, event.set)
        return (Wait(event), Well())

    class Slow(ScriptedServer):
        def _action(self, phase: str, _: Conversation) -> Any:
            return slowly() if phase != "quit" else (Well(),)

    async with Slow() as server:
        result = await send(pool, server, within=3 * LIMIT)

    assert (result.outcome, result.body_begun) == (CONNECTION, False)
    assert server.body_bytes == 0


async def test_a_silent_server_does_not_hold_a_mail_beyond_the_lease() -> None:
    pool = pool_of(timeout=20.0)
    async with ScriptedServer({"rcpt": [Wait()], "body": [Wait()]}) as server:
        began = time.monotonic()
        before = await send(pool, server, within=LIMIT)
        after = await send(pool, server, within=LIMIT)

        assert (before.outcome, before.body_begun) == (CONNECTION, False)
        assert (after.outcome, after.body_begun) == (IN_DOUBT, True)
        assert time.monotonic() - began < 2 * LIMIT + 2


async def test_a_server_that_hangs_at_rset_does_not_hold_the_outcome_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "_RESET_LIMIT_S", LIMIT)
    pool = pool_of(timeout=20.0)
    async with ScriptedServer({"rcpt": [Say("550 5.1.1 nobody")], "rset": Wait()}) as server:
        result = await send(pool, server)
        assert (result.outcome, result.smtp_code) == (PERMANENT, 550)

        # Nor does it cost the next mail anything.
        assert (await send(pool, server)).outcome is SENT
        assert (server.connections, server.visits["rset"]) == (2, 1)
        await eventually(lambda: open_connections(pool) == 1)
    await pool.close()


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_what_a_server_does_not_read_is_not_sent_after_the_end(loop_factory: Any) -> None:
    """The rest of a body must not trickle out later, nor hold a socket for ever."""
    data = b"Subject: s\r\n\r\n" + b"line\r\n" * 3_000_000

    async def scenario() -> None:
        pool, unread = pool_of(), asyncio.Event()
        async with ScriptedServer({"data": (Well(), StopReading(unread))}) as server:
            result = await send(pool, server, replace(MAIL, data=data))
            # The end of the body was never written: the server cannot have taken it.
            assert (result.outcome, result.body_begun) == (CONNECTION, True)
            unread.set()
            await eventually(lambda: not server.open)

        assert server.taken == []
        assert server.body_bytes < len(data)

    # The loop of the services, and the standard library's: their transports have no common base.
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(scenario())


# Not begun -----------------------------------------------------------------------------------


async def test_a_send_that_may_not_begin_says_nothing_to_the_server(pool: SmtpPool) -> None:
    async with ScriptedServer() as server:
        with pytest.raises(GivenBackError):
            await send(pool, server, may_begin=lambda: False)
        with pytest.raises(GivenBackError):
            await send(pool, server, within=-0.001)

        assert server.connections == 0
    assert open_connections(pool) == 0


async def test_a_no_after_354_is_a_mail_that_the_server_never_saw(pool: SmtpPool) -> None:
    gate = asyncio.Event()
    async with ScriptedServer({"data": (Wait(gate), Well())}) as server:
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


async def test_a_lease_that_ran_out_while_the_process_stood_still_begins_no_body() -> None:
    """As after SIGSTOP: 354 is there, and nothing ran until the deadline was over."""
    pool = pool_of(timeout=20.0)
    gate = asyncio.Event()
    async with ScriptedServer({"data": (Wait(gate), Well())}) as server:
        deadline = time.monotonic() + 0.3
        sending = asyncio.create_task(
            pool.send(endpoint_of(server), MAIL, lease=Lease(deadline), may_begin=lambda: True)
        )
        await eventually(lambda: server.waiting["data"] == 1)
        gate.set()
        while time.monotonic() < deadline:  # the loop stands still
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


async def test_smtputf8_is_asked_for_where_it_is_needed(pool: SmtpPool) -> None:
    async with ScriptedServer() as server:
        assert (await send(pool, server, INTERNATIONAL)).outcome is SENT
        assert (await send(pool, server)).outcome is SENT

    mails = [command for command in server.commands if command.startswith("MAIL")]
    assert mails == ["MAIL FROM:<jürgen@x.test> SMTPUTF8 BODY=8BITMIME", "MAIL FROM:<a@x.test>"]
    assert server.taken[0].rcpt_to == "名@y.test"


async def test_smtputf8_that_is_needed_and_not_offered_fails_this_mail_alone(
    pool: SmtpPool,
) -> None:
    async with ScriptedServer(extensions=["8BITMIME"]) as server:
        result = await send(pool, server, INTERNATIONAL)

        assert (result.outcome, result.enhanced_code) == (PERMANENT, "5.6.7")
        assert not result.body_begun
        assert server.visits["mail"] == 0
        assert (await send(pool, server)).outcome is SENT
        assert server.connections == 1


# TLS and AUTH --------------------------------------------------------------------------------


@pytest.mark.parametrize("security", [SmtpSecurity.STARTTLS, SmtpSecurity.TLS])
async def test_a_mail_goes_over_tls(
    security: SmtpSecurity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(tmp_path)
    context = server_context(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.public))
    pool = pool_of(timeout=5.0)
    async with ScriptedServer(tls=context, implicit_tls=security is SmtpSecurity.TLS) as server:
        for _ in range(3):
            result = await send(pool, endpoint_of(server, security=security))
            assert result.outcome is SENT, result.message

        assert server.connections == 1
        assert server.visits["starttls"] == (security is SmtpSecurity.STARTTLS)
        await pool.close()
        await eventually(lambda: not server.open)


@pytest.mark.parametrize("security", [SmtpSecurity.STARTTLS, SmtpSecurity.TLS])
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
async def test_a_certificate_that_is_not_to_be_trusted_gets_no_mail(
    security: SmtpSecurity, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(tmp_path, host=host)
    context = server_context(certificate)
    if host != "127.0.0.1":
        # Trusted, and of another host.
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.public))
    pool = pool_of(timeout=5.0)
    async with ScriptedServer(tls=context, implicit_tls=security is SmtpSecurity.TLS) as server:
        endpoint = endpoint_of(server, security=security, username="anna", password="s3cret-word")
        result = await send(pool, endpoint)

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert "certificate" in (result.message or "").lower()
        assert "AUTH" not in " ".join(server.commands)
        assert open_connections(pool) == 0


async def test_a_certificate_that_has_expired_gets_no_mail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(tmp_path, until=-timedelta(minutes=1))
    context = server_context(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.public))
    pool = pool_of(timeout=5.0)
    async with ScriptedServer(tls=context) as server:
        result = await send(pool, endpoint_of(server, security=SmtpSecurity.STARTTLS))

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert "expired" in (result.message or "")
        assert server.visits["mail"] == 0


async def test_starttls_that_is_not_offered_is_not_done_without(pool: SmtpPool) -> None:
    async with ScriptedServer() as server:
        result = await send(pool, endpoint_of(server, security=SmtpSecurity.STARTTLS))

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert server.visits["mail"] == 0
        assert open_connections(pool) == 0


@pytest.mark.parametrize("action", [Say("454 4.7.0 not now"), Close(), Wait()])
async def test_starttls_that_fails_gets_no_mail(
    pool: SmtpPool, action: Any, tmp_path: Path
) -> None:
    context = server_context(self_signed(tmp_path))
    async with ScriptedServer({"starttls": action}, tls=context) as server:
        result = await send(pool, endpoint_of(server, security=SmtpSecurity.STARTTLS))

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert server.visits["mail"] == 0
        await all_closed(pool)


AUTH = ("8BITMIME", "AUTH PLAIN")


async def test_a_sender_with_a_password_logs_in_once_a_connection(pool: SmtpPool) -> None:
    async with ScriptedServer(extensions=AUTH) as server:
        endpoint = relay_at(server, username="anna", password="s3cret-word")
        for _ in range(2):
            assert (await send(pool, endpoint)).outcome is SENT

    logins = [command for command in server.commands if command.startswith("AUTH")]
    assert logins == [f"AUTH PLAIN {plain_login('anna', 's3cret-word')}"]


@pytest.mark.parametrize(
    ("extensions", "action"),
    [
        (AUTH, Say("535 5.7.8 bad credentials")),
        (AUTH, Say("454 4.7.0 ask later")),
        (AUTH, Close()),
        (("8BITMIME",), Well()),
        (("8BITMIME", "AUTH GSSAPI"), Well()),
        (AUTH, Say(f"500 5.5.2 what? AUTH PLAIN {plain_login('anna', 's3cret-word')}")),
        (AUTH, Say("535 5.7.8 s3cret-word is wrong")),
    ],
)
async def test_a_login_that_fails_is_the_endpoints_fault_and_tells_no_password(
    pool: SmtpPool, extensions: tuple[str, ...], action: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with ScriptedServer({"auth": action}, extensions=extensions) as server:
        endpoint = relay_at(server, username="anna", password="s3cret-word")
        result = await send(pool, endpoint)

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert server.visits["mail"] == 0
        await all_closed(pool)
        texts = [result.message, pool.states()[0].last_error, repr(endpoint), caplog.text]
        for secret in ("s3cret-word", plain_login("anna", "s3cret-word")):
            assert not any(secret in (text or "") for text in texts)


async def test_senders_with_other_credentials_never_share_a_connection(pool: SmtpPool) -> None:
    async with ScriptedServer(extensions=AUTH) as server:
        for user in ("anna", "bert", "anna"):
            await send(pool, relay_at(server, username=user, password="x"))

        assert server.connections == 2


# What a user may name


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0", "2130706433", "::ffff:127.0.0.1"])
async def test_a_users_endpoint_never_leads_into_the_operators_network(host: str) -> None:
    pool = pool_of(egress=Egress(), timeout=5.0)
    async with ScriptedServer() as server:
        result = await send(pool, endpoint_of(server, host=host))

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert result.message == (
            f"{host} leads into the operator's network, where a sender's endpoint may not; the "
            "operator can list it in OUTBOX_SMTP_ALLOW"
        )
        assert server.connections == 0
        assert open_connections(pool) == 0


async def test_the_operators_relay_may_be_anywhere_and_shares_no_connection() -> None:
    pool = pool_of(egress=Egress(), timeout=5.0)
    async with ScriptedServer() as server:
        assert (await send(pool, relay_at(server))).outcome is SENT
        assert (await send(pool, endpoint_of(server))).outcome is CONNECTION
        assert server.connections == 1
    await pool.close()


async def test_a_name_is_looked_up_once_and_the_checked_address_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    look_up, answers = loop.getaddrinfo, ["127.0.0.1", "192.0.2.1"]

    async def rebinding(host: Any, port: Any, **hints: Any) -> Any:
        assert host == "rebinding.test"
        return await look_up(answers.pop(0), port, **hints)

    monkeypatch.setattr(loop, "getaddrinfo", rebinding)
    pool = pool_of(timeout=5.0)
    async with ScriptedServer() as server:
        result = await send(pool, endpoint_of(server, host="rebinding.test"))
        assert result.outcome is SENT, result.message
        assert (server.connections, answers) == (1, ["192.0.2.1"])
    await pool.close()


@pytest.mark.parametrize(
    ("reply", "tries"),
    [("535 5.7.8 wrong password", 1), ("454 4.7.0 later", 1), ("504 5.5.4 not this method", 2)],
)
async def test_a_password_is_tried_once_unless_the_server_lacks_the_method(
    pool: SmtpPool, reply: str, tries: int
) -> None:
    plan = {"auth": [Say(reply), Well()]}
    async with ScriptedServer(plan, extensions=("AUTH CRAM-MD5 PLAIN",)) as server:
        endpoint = dataclasses.replace(relay_at(server), username="anna", password="s3cret-word")
        result = await send(pool, endpoint)

        assert server.visits["auth"] == tries
        assert (result.outcome is SENT) == (tries == 2)


async def test_a_users_password_never_goes_in_clear(pool: SmtpPool) -> None:
    async with ScriptedServer(extensions=AUTH) as server:
        result = await send(pool, endpoint_of(server, username="anna", password="s3cret-word"))

        assert (result.outcome, result.body_begun) == (CONNECTION, False)
        assert "TLS only" in (result.message or "")
        assert server.connections == 0


async def test_the_number_of_endpoints_that_are_remembered_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A user may give a sender another endpoint before each mail."""
    monkeypatch.setattr(pools, "MOST_ENDPOINTS", 3)
    pool = pool_of(mails_per_connection=1)
    async with ScriptedServer() as server:
        for number in range(6):
            result = await send(pool, endpoint_of(server, ca=f"another {number}"))
            assert result.outcome is AttemptOutcome.SENT
            await eventually(lambda: not any(each.connection_count for each in pool.states()))
        assert len(pool.states()) == 3
