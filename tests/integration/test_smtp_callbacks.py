"""Sends that the events of a connection drive: how they end, wait and stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from outbox_server.services.dispatcher.smtp import GivenBackError, SendResult, SmtpPool
from outbox_server.services.dispatcher.smtp.lease import Lease
from outbox_server.shared.states import AttemptOutcome
from tests.eventually import eventually
from tests.smtp_pools import LIMIT, MAIL, endpoint_of, open_connections, pool_of, send
from tests.smtp_servers import Close, Say, ScriptedServer, StopReading, Succeed, Wait

SENT = AttemptOutcome.SENT
PIPELINING = ("8BITMIME", "PIPELINING")
LARGE = replace(MAIL, data=b"Subject: s\r\n\r\n" + b".line of a large mail\r\n" * 200_000)


@pytest.fixture
async def pool() -> AsyncIterator[SmtpPool]:
    pool = pool_of(timeout=5.0, size=1)
    yield pool
    await pool.stop()
    await pool.close()


class Ends:
    """Starts sends, and collects how they end."""

    def __init__(self, pool: SmtpPool, server: ScriptedServer) -> None:
        self._pool = pool
        self._endpoint = endpoint_of(server)
        self.found: list[SendResult | Exception] = []

    def start(self, *, within: float = 30.0, mail: Any = MAIL) -> Any:
        return self._pool.start(
            self._endpoint,
            mail,
            lease=Lease(time.monotonic() + within),
            may_begin=lambda: True,
            done=self.found.append,
        )

    @property
    def outcomes(self) -> list[Any]:
        return [end.outcome if isinstance(end, SendResult) else type(end) for end in self.found]

    async def count(self, number: int) -> None:
        await eventually(lambda: len(self.found) == number)


@pytest.mark.parametrize("extensions", [(), PIPELINING], ids=["in_sequence", "pipelined"])
async def test_waiting_mails_follow_each_other_on_one_connection_without_a_task(
    pool: SmtpPool, extensions: tuple[str, ...]
) -> None:
    async with ScriptedServer(extensions=extensions) as server:
        await send(pool, server)
        ends, tasks = Ends(pool, server), len(asyncio.all_tasks())
        for number in range(20):
            ends.start(mail=replace(MAIL, rcpt_to=f"r{number}@y.test"))
        assert len(asyncio.all_tasks()) == tasks
        await ends.count(20)
        assert set(ends.outcomes) == {SENT}
        assert [mail.rcpt_to for mail in server.taken[1:]] == [f"r{n}@y.test" for n in range(20)]
        assert server.connections == 1


async def test_the_waits_with_the_earliest_ends_end_first(pool: SmtpPool) -> None:
    """One timer serves all waits, whatever the order in which they begin."""
    gate = asyncio.Event()
    async with ScriptedServer({"mail": [(Wait(gate), Succeed())]}) as server:
        first, long, short = (Ends(pool, server) for _ in range(3))
        first.start()
        await eventually(lambda: server.waiting["mail"] == 1)
        long.start(within=30)
        for within in (3 * LIMIT, LIMIT, 2 * LIMIT):
            short.start(within=within)
        await short.count(3)
        assert short.outcomes == [GivenBackError] * 3
        assert long.found == []
        gate.set()
        await long.count(1)
        assert (first.outcomes, long.outcomes) == ([SENT], [SENT])


async def test_waiting_mails_that_the_server_cannot_take_end_one_by_one(pool: SmtpPool) -> None:
    """Each ends within the call that gives it the connection, which the next one gets."""
    gate = asyncio.Event()
    plan = {"mail": [(Wait(gate), Succeed())]}
    async with ScriptedServer(plan, extensions=("SIZE 100", "PIPELINING")) as server:
        ends = Ends(pool, server)
        ends.start()
        await eventually(lambda: server.waiting["mail"] == 1)
        for _ in range(2_000):
            ends.start(mail=LARGE)
        ends.start()
        gate.set()
        await ends.count(2_002)
        refused = [AttemptOutcome.PERMANENT_FAILURE] * 2_000
        assert sorted(ends.outcomes) == sorted([SENT, *refused, SENT])
        assert (server.connections, len(server.taken)) == (1, 2)


@pytest.mark.parametrize("phase", ["greeting", "ehlo", "mail", "rcpt", "data", "body"])
async def test_a_cancelled_send_ends_silently_and_frees_its_place(
    pool: SmtpPool, phase: str
) -> None:
    async with ScriptedServer({phase: [Wait()]}, extensions=PIPELINING) as server:
        ends = Ends(pool, server)
        attempt = ends.start()
        await eventually(lambda: server.waiting[phase] == 1)
        pool.cancel(attempt)
        assert (await send(pool, server)).outcome is SENT
        assert ends.found == []
        assert open_connections(pool) == 1


async def test_a_send_that_is_cancelled_before_its_connection_is_begun_frees_its_place(
    pool: SmtpPool,
) -> None:
    async with ScriptedServer() as server:
        ends = Ends(pool, server)
        pool.cancel(ends.start())
        assert (await send(pool, server)).outcome is SENT
        assert (ends.found, server.connections) == ([], 1)


async def test_stopping_the_pool_ends_every_send_and_leaves_no_connection(pool: SmtpPool) -> None:
    async with ScriptedServer({"data": [Wait()]}, extensions=PIPELINING) as server:
        ends = Ends(pool, server)
        for _ in range(3):
            ends.start()
        await eventually(lambda: server.waiting["data"] == 1)
        await pool.stop()
        await eventually(lambda: not server.open)
        assert (ends.found, open_connections(pool), server.taken) == ([], 0, [])


async def test_a_connection_that_closes_between_two_waiting_mails_costs_no_attempt(
    pool: SmtpPool,
) -> None:
    """The second mail begins within the event that ended the first one."""
    plan = {"body": [(Succeed(), Close())] * 5}
    async with ScriptedServer(plan, extensions=PIPELINING) as server:
        ends = Ends(pool, server)
        for _ in range(6):
            ends.start()
        await ends.count(6)
        assert ends.outcomes == [SENT] * 6
        assert len(server.taken) == 6


@pytest.mark.parametrize(
    ("replies", "outcome"),
    [
        (b"250 ok\r\n550 5.1.1 no\r\n354 go", AttemptOutcome.PERMANENT_FAILURE),
        (b"250 ok\r\n421 4.3.2 bye\r\n354 go", AttemptOutcome.CONNECTION_FAILURE),
        (b"250 ok\r\n354 go\r\n250 ok", AttemptOutcome.CONNECTION_FAILURE),
        (b"354 go\r\n250 ok\r\n250 ok", AttemptOutcome.CONNECTION_FAILURE),
        (b"250 ok\r\n250 ok\r\n250 ok", AttemptOutcome.CONNECTION_FAILURE),
    ],
    ids=["refused", "421", "354_for_rcpt", "354_first", "no_354"],
)
async def test_no_body_is_sent_to_a_server_whose_replies_do_not_fit_the_commands(
    pool: SmtpPool, replies: bytes, outcome: AttemptOutcome
) -> None:
    plan = {"mail": [(Say(replies), Close())]}
    async with ScriptedServer(plan, extensions=PIPELINING) as server:
        result = await send(pool, server)
        assert (result.outcome, result.body_begun) == (outcome, False)
        await eventually(lambda: open_connections(pool) == 0)
        assert (server.taken, server.body_bytes) == ([], 0)


async def test_a_server_that_reads_a_large_body_slowly_gets_no_more_than_it_reads() -> None:
    pool, unread = pool_of(timeout=30.0), asyncio.Event()
    plan = {"data": (Succeed(), StopReading(unread))}
    async with ScriptedServer(plan, extensions=PIPELINING) as server:
        ends = Ends(pool, server)
        ends.start(mail=LARGE)
        await eventually(lambda: server.waiting["data"] == 1)
        (attempt,) = pool._attempts
        session = attempt._session
        assert session is not None
        await eventually(lambda: not session.stream.writable)
        assert session.stream.transport.get_write_buffer_size() <= 192 * 1024
        unread.set()
        await ends.count(1)
        assert ends.outcomes == [SENT]
        assert server.taken[0].data == LARGE.data.replace(b"\n.", b"\n..")
    await pool.close()


@pytest.mark.parametrize("phase", ["rcpt", "body"])
@pytest.mark.parametrize("extensions", [(), PIPELINING], ids=["in_sequence", "pipelined"])
async def test_a_mail_ends_with_its_refusal_whatever_the_server_says_behind_it(
    pool: SmtpPool, extensions: tuple[str, ...], phase: str
) -> None:
    # In one segment with the refusal: a line that is no reply.
    refusal = Say("550 5.1.1 no such user\r\nthis is no reply")
    async with ScriptedServer({phase: refusal}, extensions=extensions) as server:
        ends = Ends(pool, server)
        for number in (1, 2):
            # The second send has the only place of the pool, which must be free again.
            ends.start()
            await ends.count(number)

        refused = {AttemptOutcome.PERMANENT_FAILURE, AttemptOutcome.CONNECTION_FAILURE}
        assert set(ends.outcomes) <= refused
