"""What dispatchers report about themselves: who made an attempt, and which of them run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Final

import pytest
from outbox.v1 import dispatcher_pb2, email_job_pb2
from outbox.v1.dispatcher_service_pb2 import ListDispatchersRequest
from outbox.v1.stats_pb2 import EndpointStats
from outbox.v1.stats_service_pb2 import ListEndpointStatsRequest
from outbox.v1.stats_service_pb2_grpc import StatsServiceStub

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.scheduler.storage.email_jobs import list_attempts, read_job
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.scheduler_stack import refusal_of
from tests.smtp_servers import Say, ScriptedServer, Succeed, Wait
from tests.stats_stack import stats_server
from tests.two_users import make_keys
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
                [attempt], _ = await list_attempts(connection, job, None, 0, 10, descending=False)
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
                for text, order, ids in (
                    ("", "start_time", [me, other]),
                    ("", "start_time desc", [other, me]),
                    (f"dispatcher_id = {other}", "", [other]),
                    ("state = SERVING AND NOT concurrency < 5", "", [me, other]),
                    ("state = DISPATCHER_STATE_DRAINING OR in_flight_count > 0", "", []),
                    ("oldest_lease_time < 2999-01-01T00:00:00Z", "", []),
                    ("oldest_lease_time != 2999-01-01T00:00:00Z", "", [me, other]),
                    ("start_time > 2026-01-01T00:00:00Z", "start_time desc", [other, me]),
                ):
                    asked = ListDispatchersRequest(filter=text, order_by=order)
                    answer = await first.stub.ListDispatchers(asked)
                    assert [one.dispatcher_id for one in answer.dispatchers] == ids, text
                asked = ListDispatchersRequest(filter="nothing = 1", order_by="state")
                refusal = await refusal_of(first.stub.ListDispatchers(asked))
                assert set(refusal.violations) == {"filter", "order_by"}
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


async def test_endpoints_are_shown_with_their_replies_to_their_user_and_to_operators(
    database_url: str, redis_url: str, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox_server.services.dispatcher.reporter.REPORT_EVERY", SHORT)
    plan = {"rcpt": [Say("550 5.1.1 no such user"), Succeed(), Succeed()]}
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(ScriptedServer(plan))
        settings = settings_of(options(database_url, redis_url, inbox.url))
        world = await stack.enter_async_context(World(settings))
        # Two dispatchers, whose counts are added.
        for _ in range(2):
            await stack.enter_async_context(running(settings))
        channel = await stack.enter_async_context(
            stats_server(database_url, redis_url, auth="keys")
        )
        keys = await make_keys(database_url)
        stub = StatsServiceStub(channel)
        own, relay = await world.sender(user="ann"), await world.sender(user="eve")
        await world.sql(
            "UPDATE senders SET smtp_host = '127.0.0.1', smtp_port = %s, smtp_security = 1,"
            " smtp_username = '' WHERE id = %s",
            server.port,
            own,
        )
        await world.schedule(own, 3)
        await world.schedule(relay, 2)
        await eventually(world.done)

        async def shown(caller: str, user_id: str = "") -> dict[tuple[str, int], EndpointStats]:
            request = ListEndpointStatsRequest(user_id=user_id)
            answer = await stub.ListEndpointStats(request, metadata=keys[caller])
            return {(one.user_id, one.port): one for one in answer.endpoint_stats}

        async def all_counted() -> bool:
            return sum(one.attempt_count for one in (await shown("operator")).values()) == 5

        await eventually(all_counted)
        mine = await shown("ann")
        assert mine == await shown("operator", "ann") == await shown("service", "ann")
        found = mine["ann", server.port]
        assert len(mine) == 1
        assert found.host == "127.0.0.1"
        assert {one.reply_class: one.count for one in found.replies} == {
            email_job_pb2.REPLY_CLASS_SENT: 2,
            email_job_pb2.REPLY_CLASS_RECIPIENT: 1,
        }
        half, most = found.latency_p50.ToTimedelta(), found.latency_p99.ToTimedelta()
        assert timedelta(0) < half <= most
        # Nobody but an operator sees the relay.
        assert await shown("eve") == {}
        everyone = await shown("operator")
        assert {user for user, _ in everyone} == {"ann", ""}
        for text, order, users in (
            ("", "", ["ann", ""]),
            ("", "attempt_count", ["", "ann"]),
            (f"port = {server.port} AND host = 127.0.0.1", "", ["ann"]),
            ("user_id != ann OR attempt_count > 2", "attempt_count desc", ["ann", ""]),
            ("NOT circuit_open_time != 2026-01-01T00:00:00Z", "", []),
            ("dispatcher_count > 2", "", []),
        ):
            asked = ListEndpointStatsRequest(filter=text, order_by=order)
            answer = await stub.ListEndpointStats(asked, metadata=keys["operator"])
            assert [one.user_id for one in answer.endpoint_stats] == users, text
        # A filter shows nobody what belongs to others.
        asked = ListEndpointStatsRequest(filter='user_id != ""')
        answer = await stub.ListEndpointStats(asked, metadata=keys["eve"])
        assert not answer.endpoint_stats
        asked = ListEndpointStatsRequest(filter="nothing = 1", order_by="host")
        refusal = await refusal_of(stub.ListEndpointStats(asked, metadata=keys["service"]))
        assert refusal.reason == "USER_ID_REQUIRED"
        assert set(refusal.violations) == {"user_id", "filter", "order_by"}
