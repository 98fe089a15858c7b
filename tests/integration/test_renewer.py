"""Leases are renewed while sends last, and a send that cannot be renewed stops in time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import event, text

from outbox_server.deploy.embedded.proxy import TcpProxy
from outbox_server.services.dispatcher import storage
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.connection import connect, open_queues
from outbox_server.shared.queue.following import FollowingClient
from outbox_server.shared.queue.keys import member_of
from outbox_server.shared.queue.records import Claim
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import AttemptOutcome, JobState
from tests.conftest import Stores
from tests.dispatchers import options, settings_of
from tests.eventually import eventually
from tests.renewing import LeasedSend, SendingWithoutSmtp
from tests.world import World

# Short, but long enough for a machine that is busy with other tests.
LEASE = timedelta(seconds=2)
ROOT = Path(__file__).parent.parent.parent


@pytest_asyncio.fixture
async def world(database_url: str, redis_url: str) -> AsyncIterator[World]:
    values = options(database_url, redis_url, "smtp://127.0.0.1:1", lease="2s", shards=2)
    async with World(settings_of(values)) as world:
        yield world


@asynccontextmanager
async def sending_with(
    settings: Settings, redis_of: Sequence[FollowingClient] | None = None
) -> AsyncIterator[SendingWithoutSmtp]:
    """Yield a sender of mails with these settings; `redis_of` gives the Redis of each shard."""
    async with AsyncExitStack() as stack:
        statements = create_engine(settings, lookups_only=True, single_statements=True)
        stack.push_async_callback(statements.dispose)
        redis = connect(settings)
        stack.push_async_callback(redis.aclose)
        queues = open_queues(redis, settings)
        for number, other in enumerate(redis_of or ()):
            queues[number] = open_queues(other, settings)[number]
        sending = SendingWithoutSmtp(settings, statements, HeadLoader(statements, queues, settings))
        await stack.enter_async_context(sending.running())
        yield sending


@pytest_asyncio.fixture
async def sending(world: World) -> AsyncIterator[SendingWithoutSmtp]:
    async with sending_with(world.settings) as sending:
        yield sending


async def lease_in_redis(world: World, claim: Claim) -> int | None:
    key = world.loader.queue_of(claim.sender_id).keys.ready.replace(
        "ready", f"lease:{claim.sender_id}"
    )
    end = await world.redis.zscore(key, member_of(claim.job))
    return None if end is None else int(end)


async def renewed_for(world: World, send: LeasedSend, leases: float) -> None:
    """Wait until both leases of a send are `leases` times a lease longer than at first."""
    longer = leases * LEASE

    async def both() -> bool:
        until = (await world.job(send.job)).lease_until
        in_redis = await lease_in_redis(world, send.claim) or 0
        return bool(
            until >= send.marked.lease_until + longer
            and in_redis >= send.claim.lease_ms + longer / timedelta(milliseconds=1)
        )

    await eventually(both)


async def leases_in_redis(world: World) -> int:
    return sum([await world.leases_in_redis(row.id) for row in await world.sql("TABLE senders")])


# Both stores are reachable -------------------------------------------------------------------


async def test_a_reply_that_takes_several_leases_is_awaited(
    world: World, sending: SendingWithoutSmtp
) -> None:
    await world.schedule(await world.sender())
    [send] = await sending.begin()
    waiting = asyncio.create_task(sending.send(send))
    await renewed_for(world, send, 2.5)
    async with sending.statements.connect() as connection:
        assert await storage.recover_expired(connection, LEASE, JobState.SCHEDULED) == {}
    # No other process has the job or its entry.
    assert await sending.begin() == []
    send.reply.set()
    await waiting
    await sending.settle(send)

    row = await world.job(send.job)
    assert (row.state, row.attempt, send.replied) == (JobState.SENT, 1, True)
    assert await leases_in_redis(world) == 0


async def test_a_send_that_has_no_connection_yet_is_not_renewed(
    world: World, sending: SendingWithoutSmtp
) -> None:
    await world.schedule(await world.sender(), 2)
    waits, runs = await sending.begin(2)
    waiting = sending.renewer.begin(waits.claim, waits.marked, waits.claimed)
    task = asyncio.create_task(sending.send(runs))
    await renewed_for(world, runs, 0.5)
    assert (await world.job(waits.job)).lease_until == waits.marked.lease_until
    runs.reply.set()
    await task
    sending.renewer.end(waiting)


async def test_many_jobs_are_renewed_by_one_statement(
    world: World, sending: SendingWithoutSmtp
) -> None:
    for _ in range(10):
        await world.schedule(await world.sender(), 5)
    sizes: list[int] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "UPDATE email_jobs SET lease_until" in statement:
            sizes.append(len(parameters["ids"]))

    sends = await sending.begin(50)
    assert len(sends) == 50
    event.listen(sending.statements.sync_engine, "before_cursor_execute", note)
    tasks = [asyncio.create_task(sending.send(send)) for send in sends]
    for send in sends:
        await renewed_for(world, send, 0.3)
    for send in sends:
        send.reply.set()
    await asyncio.gather(*tasks)

    # One statement for all jobs of a shard that were claimed at once.
    assert sum(sizes) / len(sizes) >= 10, sizes
    assert sum(sizes[:2]) >= 50


# A store is unreachable ----------------------------------------------------------------------


@pytest_asyncio.fixture
async def proxies(stores: Stores, world: World) -> AsyncIterator[dict[str, TcpProxy]]:
    """Proxies in front of both stores."""
    port = int(conninfo_to_dict(world.settings.database_url)["port"] or 0)
    async with (
        TcpProxy(lambda: port) as postgres,
        TcpProxy(lambda: stores.redis.port) as redis,
    ):
        yield {"postgres": postgres, "redis": redis}


def through(settings: Settings, *, postgres: TcpProxy, redis: TcpProxy) -> Settings:
    """Return settings that reach both stores through proxies."""
    port = str(conninfo_to_dict(settings.database_url)["port"])
    database_url = settings.database_url.replace(f":{port}/", f":{postgres.port}/")
    assert database_url != settings.database_url
    stored = urlsplit(settings.redis_url)
    redis_url = settings.redis_url.replace(f":{stored.port}/", f":{redis.port}/")
    assert redis_url != settings.redis_url
    return settings.model_copy(update={"database_url": database_url, "redis_url": redis_url})


@pytest.mark.parametrize("in_body", [True, False], ids=["in its body", "before its body"])
@pytest.mark.parametrize("fault", ["refuse", "hang"])
@pytest.mark.parametrize("store", ["postgres", "redis"])
async def test_a_send_that_cannot_be_renewed_stops_before_its_lease_ends_and_has_one_outcome(
    world: World, proxies: dict[str, TcpProxy], store: str, fault: str, in_body: bool
) -> None:
    settings = through(world.settings, **proxies)
    proxy = proxies[store]
    sender = await world.sender()
    await world.schedule(sender)
    async with sending_with(settings) as sending:
        [send] = await sending.begin(in_body=in_body)
        waiting = asyncio.create_task(sending.send(send))
        await renewed_for(world, send, 0.5)
        getattr(proxy, fault)()
        await waiting
        assert send.leased is not None
        assert not send.replied
        # Both leases run from a time after the request, and the deadline counts from the request.
        assert send.leased.lease.until < send.leased.renewed + LEASE.total_seconds()
        proxy.heal()
        await sending.settle(send)

        # The outcome is recorded once: as in doubt, or as no attempt or one whose body did not
        # begin.
        outcomes = [each.outcome for each in await world.attempts(send.job)]
        row = await world.job(send.job)
        if in_body:
            assert outcomes == [AttemptOutcome.IN_DOUBT]
        else:
            assert outcomes in ([], [AttemptOutcome.TEMPORARY_FAILURE])
            assert row.failures == 0
        assert row.state == JobState.SCHEDULED

        async def sent_again() -> bool:
            await world.loader.load([sender], committed=True)
            sends = await sending.begin()
            return [each.job for each in sends] == [send.job]

        await eventually(sent_again)


async def test_an_unreachable_shard_stops_no_send_of_another_shard(
    world: World, proxies: dict[str, TcpProxy]
) -> None:
    senders = [await world.sender() for _ in range(2)]
    for sender in senders:
        await world.schedule(sender)
    away = connect(through(world.settings, **proxies))
    # The first shard is unreachable, because it is called first.
    async with away, sending_with(world.settings, redis_of=[away]) as sending:
        sends = {send.claim.sender_id % 2: send for send in await sending.begin()}
        tasks = {shard: asyncio.create_task(sending.send(send)) for shard, send in sends.items()}
        proxies["redis"].refuse()
        await tasks[0]
        await renewed_for(world, sends[1], 2)
        assert not tasks[1].done()
        sends[1].reply.set()
        await tasks[1]

    assert (sends[0].replied, sends[1].replied) == (False, True)


async def test_a_silent_connection_to_postgresql_stops_no_send(
    world: World, proxies: dict[str, TcpProxy]
) -> None:
    proxy = proxies["postgres"]
    lease = 2 * LEASE
    settings = world.settings.model_copy(update={"lease": lease})
    await world.schedule(await world.sender())
    async with sending_with(settings) as sending:
        silent = True

        def choose(_dialect: Any, _record: Any, _arguments: Any, options: dict[str, Any]) -> None:
            if silent:
                options["port"] = proxy.port

        event.listen(sending.statements.sync_engine, "do_connect", choose)
        [send] = await sending.begin()
        silent = False
        proxy.hang()
        waiting = asyncio.create_task(sending.send(send))
        await renewed_for(world, send, 3)
        assert not waiting.done()
        send.reply.set()
        await waiting
        proxy.heal()

    assert send.replied


async def test_a_lost_redis_stops_no_send_that_is_restored_in_time(
    world: World, sending: SendingWithoutSmtp
) -> None:
    await world.schedule(await world.sender())
    [send] = await sending.begin()
    waiting = asyncio.create_task(sending.send(send))
    for leases in (0.5, 1.5):
        await renewed_for(world, send, leases)
        await world.redis.flushall()
        # Every dispatcher that finds the shard lost does this.
        for queue in world.queues:
            assert await world.loader.rebuild(queue)
    await renewed_for(world, send, 3)
    assert not waiting.done()
    send.reply.set()
    await waiting
    await sending.settle(send)

    assert (await world.job(send.job)).state == JobState.SENT
    assert await leases_in_redis(world) == 0


async def test_a_lost_redis_that_is_not_restored_stops_the_send(
    world: World, sending: SendingWithoutSmtp
) -> None:
    await world.schedule(await world.sender())
    [send] = await sending.begin()
    waiting = asyncio.create_task(sending.send(send))
    await renewed_for(world, send, 0.5)
    await world.redis.flushall()
    await waiting

    assert not send.replied


# Another process has the job -----------------------------------------------------------------


async def test_a_send_whose_job_was_recovered_stops_at_once_and_overwrites_nothing(
    world: World, sending: SendingWithoutSmtp
) -> None:
    await world.schedule(await world.sender())
    [send] = await sending.begin()
    waiting = asyncio.create_task(sending.send(send))
    await renewed_for(world, send, 0.3)
    await world.sql("UPDATE email_jobs SET lease_until = now() - interval '1 second'")
    async with sending.statements.connect() as connection:
        assert await storage.recover_expired(connection, LEASE, JobState.SCHEDULED)
    await waiting
    assert send.leased is not None
    assert not send.leased.lease.holds
    lost = sending.registry.get_sample_value("outbox_lost_leases_total", {"found": "renewal"})
    assert lost == 1
    before = (await world.job(send.job), await world.attempts(send.job))
    send.replied = True  # its reply arrived nevertheless
    await sending.settle(send)

    assert (await world.job(send.job), await world.attempts(send.job)) == before


async def test_a_dispatcher_paused_past_a_renewed_lease_stops_and_overwrites_nothing(
    world: World, sending: SendingWithoutSmtp
) -> None:
    await world.schedule(await world.sender())
    values = options(
        world.settings.database_url, world.settings.redis_url, "smtp://127.0.0.1:1"
    ) | {"lease": "2s", "shards": "2"}
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.renewing",
        json.dumps(values),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdout is not None
    try:
        assert await child.stdout.readline() == b"begun\n"
        [row] = await world.sql("SELECT id, lease_until FROM email_jobs WHERE state = 2")

        async def renewed() -> bool:
            return bool((await world.job(row.id)).lease_until > row.lease_until + LEASE)

        await eventually(renewed)
        child.send_signal(signal.SIGSTOP)

        async def recovered() -> bool:
            async with sending.statements.connect() as connection:
                return bool(await storage.recover_expired(connection, LEASE, JobState.SCHEDULED))

        await eventually(recovered)
        await world.loader.load([(await world.job(row.id)).sender_id], committed=True)

        async def sent_by_another() -> bool:
            return bool(await asyncio.shield(begin_again()))

        again: list[LeasedSend] = []

        async def begin_again() -> list[LeasedSend]:
            again.extend(await sending.begin())
            return again

        await eventually(sent_by_another)
        assert again[0].marked.job.attempt == 2
        child.send_signal(signal.SIGCONT)
        assert await child.stdout.readline() == b"stopped\n"
        assert await child.wait() == 0
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()

    job = await world.job(row.id)
    assert (job.state, job.attempt) == (JobState.SENDING, 2)
    assert [each.outcome for each in await world.attempts(row.id)] == [AttemptOutcome.LEASE_EXPIRED]


# What a send knows about its lease -----------------------------------------------------------


async def test_a_send_is_given_back_under_its_renewed_lease(
    world: World, sending: SendingWithoutSmtp
) -> None:
    await world.schedule(await world.sender())
    [send] = await sending.begin(in_body=False)
    waiting = asyncio.create_task(sending.send(send))
    await renewed_for(world, send, 1)
    assert send.leased is not None
    await eventually(lambda: send.leased and send.leased.known)
    send.leased.lease.extend(time.monotonic())
    await waiting
    await sending.settle(send)

    row = await world.job(send.job)
    assert (row.state, row.attempt) == (JobState.SCHEDULED, 0)
    assert await leases_in_redis(world) == 0
    assert [each.job for each in await sending.begin()] == [send.job]


async def test_a_send_that_stops_during_a_renewal_is_recorded_as_an_attempt(
    world: World, sending: SendingWithoutSmtp
) -> None:
    await world.schedule(await world.sender())
    [send] = await sending.begin(in_body=False)
    waiting = asyncio.create_task(sending.send(send))
    async with world.engine.begin() as holder:
        await holder.execute(
            text("SELECT 1 FROM email_jobs WHERE id = :id FOR UPDATE"), {"id": send.job}
        )
        await eventually(lambda: send.leased and not send.leased.known)
        assert send.leased is not None
        send.leased.lease.extend(time.monotonic())
        await waiting
        # Statements that PostgreSQL executed but whose answers were lost.
        await holder.execute(
            text("UPDATE email_jobs SET lease_until = :until"),
            {"until": datetime.now(UTC) + LEASE * 100},
        )
    await sending.settle(send)

    row = await world.job(send.job)
    assert (row.state, row.attempt, row.failures) == (JobState.SCHEDULED, 1, 0)
    [attempt] = await world.attempts(send.job)
    assert (attempt.outcome, attempt.counted) == (AttemptOutcome.TEMPORARY_FAILURE, False)
    assert await leases_in_redis(world) == 0
    [again] = await sending.begin()
    assert again.marked.job == (send.job, 2)
