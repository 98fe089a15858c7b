"""A server says 421 and closes the connection, or says nothing more: the reply counts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from outbox_server.services.dispatcher.smtp import Envelope, SmtpPool
from outbox_server.shared.egress import Egress
from outbox_server.shared.smtp.limits import PhaseLimits
from outbox_server.shared.smtp.probe import Prober
from outbox_server.shared.smtp.replies import Phase, ReplyRules
from outbox_server.shared.states import AttemptOutcome, ReplyClass
from outbox_server.shared.tls import TlsContexts
from tests.eventually import eventually
from tests.smtp_pools import MAIL, endpoint_of, open_connections, pool_of, send
from tests.smtp_servers import Close, Say, ScriptedServer, StopReading, Succeed, Wait

PIPELINING = ("8BITMIME", "PIPELINING")
BYE = "421 4.3.2 closing"
LARGE = replace(MAIL, data=b"Subject: s\r\n\r\n" + b"a line of a large mail\r\n" * 200_000)
# Far beyond the time that a test takes: no test may need a limit to end.
NEVER_S = 300.0


@pytest.fixture
async def pool() -> AsyncIterator[SmtpPool]:
    pool = pool_of(timeout=NEVER_S)
    yield pool
    await pool.close()


@pytest.mark.parametrize("byte_by_byte", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("extensions", [(), PIPELINING], ids=["in_sequence", "pipelined"])
@pytest.mark.parametrize("then", [Close, Wait])
@pytest.mark.parametrize("phase", ["greeting", "ehlo", "mail", "rcpt", "data", "body"])
async def test_a_421_counts_whether_or_not_the_server_closes(
    pool: SmtpPool, phase: str, then: Any, extensions: tuple[str, ...], byte_by_byte: bool
) -> None:
    plan = {phase: (Say(BYE), then())}
    server = ScriptedServer(plan, extensions=extensions, byte_by_byte=byte_by_byte)
    async with server:
        result = await send(pool, server)
        assert (result.smtp_code, result.enhanced_code) == (421, "4.3.2")
        assert result.body_begun is (phase == "body")
        assert pool_trusts(pool)
        await eventually(lambda: open_connections(pool) == 0)


@pytest.mark.parametrize(
    "replies",
    [
        pytest.param({"mail": (Succeed(), Say(BYE), Close())}, id="behind_the_reply_to_mail"),
        pytest.param({"rcpt": (Succeed(), Say(BYE), Close())}, id="behind_the_reply_to_rcpt"),
        pytest.param({"data": (Say(f"354 go\r\n{BYE}"), Close())}, id="behind_354"),
        pytest.param({"mail": (Say(f"250 ok\r\n{BYE}"), Close())}, id="in_one_packet_with_250"),
        pytest.param({"mail": (Say(f"250 ok\r\n250 ok\r\n{BYE}"), Close())}, id="instead_of_354"),
        pytest.param({"mail": (Say(f"{BYE}\r\nno reply"), Close())}, id="before_a_line_of_junk"),
        pytest.param({"mail": (Say(f"421-4.3.2 bye\r\n{BYE}"), Close())}, id="of_two_lines"),
    ],
)
@pytest.mark.parametrize("extensions", [(), PIPELINING], ids=["in_sequence", "pipelined"])
async def test_a_421_in_reply_to_any_command_counts(
    pool: SmtpPool, replies: dict[str, Any], extensions: tuple[str, ...]
) -> None:
    async with ScriptedServer(replies, extensions=extensions) as server:
        result = await send(pool, server)
        assert (result.smtp_code, result.body_begun) == (421, False)
        assert (server.taken, server.body_bytes) == ([], 0)


async def test_another_refusal_counts_too_if_the_server_closes_behind_it(pool: SmtpPool) -> None:
    plan = {"rcpt": [(Say("550 5.1.1 nobody"), Close())]}
    async with ScriptedServer(plan, extensions=PIPELINING) as server:
        result = await send(pool, server)
        assert (result.outcome, result.smtp_code) == (AttemptOutcome.PERMANENT_FAILURE, 550)
        assert (await send(pool, server)).outcome is AttemptOutcome.SENT
        assert server.connections == 2


@pytest.mark.parametrize("phase", ["mail", "rcpt", "data", "body"])
async def test_a_421_on_a_kept_connection_costs_no_attempt(pool: SmtpPool, phase: str) -> None:
    plan = {phase: [Succeed(), (Say(BYE), Close())]}
    async with ScriptedServer(plan, extensions=PIPELINING) as server:
        for _ in range(2):
            assert (await send(pool, server)).outcome is AttemptOutcome.SENT
        assert (server.connections, len(server.taken)) == (2, 2 + (phase == "body"))


async def test_a_421_within_a_body_that_the_server_does_not_read_counts(pool: SmtpPool) -> None:
    plan = {"data": (Succeed(), Say(BYE), StopReading())}
    async with ScriptedServer(plan, extensions=PIPELINING) as server:
        result = await send(pool, server, LARGE)
        assert result.smtp_code == 421
        assert result.outcome is not AttemptOutcome.IN_DOUBT
        assert result.reply_class is ReplyClass.SESSION


@pytest.mark.parametrize("phase", [Phase.MAIL, Phase.RCPT])
async def test_the_probe_of_an_endpoint_reports_a_421(phase: Phase) -> None:
    prober = Prober(
        limits=PhaseLimits.of(NEVER_S),
        limit=NEVER_S,
        rules=ReplyRules.load(""),
        helo="client.test",
        egress=Egress(["127.0.0.0/8"]),
        tls=TlsContexts(),
    )
    plan = {phase.value.lower(): (Say(BYE), Close())}
    async with ScriptedServer(plan, extensions=PIPELINING) as server:
        found = await prober.probe(endpoint_of(server), "a@x.test", "b@y.test")
        assert (found.smtp_code, found.failed_phase) == (421, phase)


def pool_trusts(pool: SmtpPool) -> bool:
    return all(each.trusts_pipelining for each in pool._pools.values())


@pytest.mark.parametrize("mail", [MAIL, LARGE], ids=["one_write", "blocks"])
async def test_a_mail_is_not_in_doubt_if_the_connection_had_ended_before_its_body(
    pool: SmtpPool, mail: Envelope
) -> None:
    def end_at_354() -> bool:
        if server.visits["data"]:
            (attempt,) = pool._attempts
            assert attempt._session is not None
            attempt._session.abort()
        return True

    async with ScriptedServer(extensions=PIPELINING) as server:
        result = await send(pool, server, mail, may_begin=end_at_354)
        assert result.outcome is AttemptOutcome.CONNECTION_FAILURE
        assert (result.body_begun, server.taken, server.body_bytes) == (False, [], 0)
