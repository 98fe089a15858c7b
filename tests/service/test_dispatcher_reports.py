"""What dispatchers report about themselves: who made an attempt, and which of them run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Final

import pytest
from outbox.v1 import dispatcher_pb2
from outbox.v1.dispatcher_service_pb2 import ListDispatchersRequest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.scheduler.storage.email_jobs import list_attempts, read_job
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.smtp_servers import ScriptedServer, Wait
from tests.world import World

SHORT: Final = timedelta(milliseconds=50)
Listed = Callable[[], Awaitable[dict[str, dispatcher_pb2.Dispatcher]]]


async def _are(listed: Listed, expected: set[str]) -> bool:
    return set(await listed()) == expected


async def test_an_attempt_has_its_dispatcher_and_its_endpoint(
    database_url: str, redis_url: str, inbox: Inbox
) -> None:
    settings = settings_of(options(database_url, redis_url, inbox.url))
    async with World(settings) as world, running(settings) as dispatcher:
        host, port = "127.0.0.1", int(inbox.url.rpartition(":")[2])
        relay, own = await world.sender(), await world.sender()
        await world.sql(
            "UPDATE senders SET smtp_host = %s, smtp_port = %s, smtp_security = 1,"
            " smtp_username = '' WHERE id = %s",
            host,
            port,
            own,
        )
        jobs = [(await world.schedule(sender, 1))[0] for sender in (relay, own)]
        await eventually(world.done)
        status = await dispatcher.status()
        endpoints = []
        async with world.engine.connect() as connection:
            for job in jobs:
                [attempt] = await list_attempts(connection, job, 0, 10)
                found = await read_job(connection, job, None)
                assert found is not None
                assert found.last == attempt
                assert attempt.dispatcher_id == status.dispatcher_id
                endpoints.append(attempt.endpoint)
        assert endpoints == ["relay", f"{host}:{port}"]


async def test_the_dispatchers_that_run_are_listed_with_what_they_do(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox_server.services.dispatcher.reporter.REPORT_EVERY", SHORT)
    async with ScriptedServer({"mail": Wait()}) as server:
        settings = settings_of(options(database_url, redis_url, server.url, shutdown_grace="1s"))
        async with World(settings) as world, running(settings) as first:

            async def listed() -> dict[str, dispatcher_pb2.Dispatcher]:
                answer = await first.stub.ListDispatchers(ListDispatchersRequest())
                return {one.dispatcher_id: one for one in answer.dispatchers}

            me = (await first.status()).dispatcher_id
            async with running(settings) as second:
                other = (await second.status()).dispatcher_id
                await eventually(lambda: _are(listed, {me, other}))
            # One that has stopped is not listed, nor one that was killed.
            await eventually(lambda: _are(listed, {me}))
            await world.sql(
                "INSERT INTO dispatchers (dispatcher_id, concurrency, seen_at, draining, in_flight,"
                " sent_per_second, attempts_per_second)"
                " VALUES ('killed', 1, now() - interval '1 min', false, 0, 0, 0)"
            )
            await world.schedule(await world.sender(), 1)

            async def sending() -> bool:
                found = (await listed())[me]
                return found.in_flight_count == 1 and found.HasField("oldest_lease_time")

            await eventually(sending)
            assert set(await listed()) == {me}
            found = (await listed())[me]
            assert found.concurrency == settings.dispatcher_concurrency
            assert found.state == dispatcher_pb2.DISPATCHER_STATE_SERVING
            assert found.start_time.seconds <= found.oldest_lease_time.seconds + 1
