"""A slow endpoint does not delay mail to quick endpoints, and waiting claims cause no work."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.services.dispatcher import slots
from outbox_server.shared.states import JobState, SmtpSecurity
from tests.dispatchers import RunningDispatcher, options, running, settings_of
from tests.eventually import eventually
from tests.smtp_servers import ScriptedServer, Succeed, Wait
from tests.world import World, jobs_in

Configure = Callable[..., dict[str, str]]


@pytest.fixture
def configure(database_url: str, redis_url: str, inbox: Inbox) -> Configure:
    def build(**changes: str | int) -> dict[str, str]:
        return options(
            database_url, redis_url, inbox.url, **{"smtp_timeout": "30s", "lease": "60s"} | changes
        )

    return build


def by(server: ScriptedServer) -> dict[str, Any]:
    return {
        "smtp_host": "127.0.0.1",
        "smtp_port": server.port,
        "smtp_security": int(SmtpSecurity.NONE),
    }


def end(dispatcher: RunningDispatcher, server: ScriptedServer) -> None:
    """Stop without waiting for sends that hang."""
    dispatcher.stopping.set()
    server.cut()


async def test_a_job_claimed_ahead_goes_to_another_dispatcher_when_sends_take_longer(
    configure: Configure,
) -> None:
    hold = Wait()
    # The replies become slow at once, when jobs were claimed ahead.
    async with ScriptedServer({"body": [*[Succeed()] * 60, (hold, Succeed())]}) as server:
        values = configure(dispatcher_concurrency=1, lease="10m", smtp_timeout="5m") | {
            "smtp_url": server.url
        }
        settings = settings_of(values)
        async with World(settings) as world:
            jobs = [job for _ in range(3) for job in await world.schedule(await world.sender(), 40)]
            async with running(settings):
                await eventually(lambda: server.waiting["body"] == 1)
                async with running(settings):
                    await eventually(lambda: len(server.taken) == len(jobs))
                    hold.event.set()
                    await eventually(world.done)
            assert jobs_in(server.taken) == dict.fromkeys(jobs, 1)


@pytest.mark.parametrize(("phase", "gap_ms"), [("greeting", 0), ("rcpt", 50), ("body", 50)])
async def test_an_endpoint_that_hangs_delays_no_sender_of_another(
    configure: Configure, inbox: Inbox, phase: str, gap_ms: int
) -> None:
    settings = settings_of(configure())
    async with ScriptedServer({phase: Wait()}) as server, World(settings) as world:
        sick = [await world.sender(gap_ms=gap_ms, **by(server)) for _ in range(8)]
        well = [await world.sender(gap_ms=gap_ms) for _ in range(3)]
        for sender in sick:
            await world.schedule(sender, 5)
        async with running(settings) as dispatcher:
            await eventually(lambda: server.waiting[phase] == 2)
            await eventually(lambda: all_claimed(world, sick))
            began = time.time()
            jobs = [job for sender in well for job in await world.schedule(sender, 5)]
            await eventually(lambda: world.done(*well))

            assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
            # No mail to the silent server has ended meanwhile.
            assert server.waiting[phase] == 2
            assert max(mail.started_at for mail in inbox.mails) - began < 20
            # Waiting claims are not marked, so their jobs can be cancelled.
            states = await world.states(*sick)
            assert states[JobState.SENDING] == 2
            waiting = await world.in_state(JobState.SCHEDULED)
            assert await world.cancel(sorted(waiting)) == len(waiting)
            end(dispatcher, server)


async def test_a_claim_that_waits_for_a_slot_costs_no_work_and_no_attempt(
    configure: Configure, redis: Any
) -> None:
    settings = settings_of(configure(smtp_timeout="100s", lease="120s"))
    async with ScriptedServer({"rcpt": Wait()}) as server, World(settings) as world:
        senders = [await world.sender(gap_ms=1, **by(server)) for _ in range(50)]
        for sender in senders:
            await world.schedule(sender, 20)
        async with running(settings) as dispatcher:
            # Each sender has one claim, and its next job is not claimed.
            await eventually(lambda: all_claimed(world, senders))

            async def is_quiet() -> bool:
                """Return whether only heartbeats and searches for lost senders run for a second.

                The first claim of a sender is marked and given back because its route is not known
                yet. On a busy machine this may happen after every sender was seen with a claim.
                """
                calls, began = await script_calls(redis), time.monotonic()
                await eventually(lambda: time.monotonic() - began > 1)
                return await script_calls(redis) - calls < 10 * (time.monotonic() - began)

            await eventually(is_quiet)
            assert await all_claimed(world, senders)
            attempts = await world.sql(
                "SELECT max(attempt) AS most FROM email_jobs WHERE state = 1"
            )
            assert attempts[0].most == 0
            end(dispatcher, server)


async def script_calls(redis: Any) -> int:
    stats = await redis.info("commandstats")
    return sum(
        int(stats.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in ("evalsha", "eval")
    )


async def all_claimed(world: World, senders: list[int]) -> bool:
    return all([await world.leases_in_redis(sender) for sender in senders])


async def test_claims_that_wait_for_a_slot_are_sent_once_the_endpoint_has_recovered(
    configure: Configure,
) -> None:
    settings = settings_of(configure(smtp_timeout="1s", lease="2s", retry_backoff="100ms"))
    async with ScriptedServer({"rcpt": [Wait()] * 4}) as server, World(settings) as world:
        senders = [await world.sender(gap_ms=1, **by(server)) for _ in range(12)]
        jobs = [job for sender in senders for job in await world.schedule(sender, 2)]
        async with running(settings):
            await eventually(world.done)
        assert await world.states() == {JobState.SENT: 24}
        assert jobs_in(server.taken) == dict.fromkeys(jobs, 1)
        await world.check_counts()


async def test_a_drain_gives_back_the_claims_that_wait_for_a_slot(configure: Configure) -> None:
    settings = settings_of(configure())
    async with ScriptedServer({"rcpt": Wait()}) as server, World(settings) as world:
        senders = [await world.sender(gap_ms=1, **by(server)) for _ in range(10)]
        for sender in senders:
            await world.schedule(sender, 2)
        async with running(settings) as dispatcher:
            await eventually(lambda: all_claimed(world, senders))
            # This ends the hanging mails. A claim that waited may begin before the drain does.
            await server.stop()
            await dispatcher.drain()
            assert not any([await world.leases_in_redis(sender) for sender in senders])
        assert (await world.states())[JobState.SENDING] == 0
        await world.check_counts()


async def test_a_slow_endpoint_gets_all_slots_except_the_reserved_ones(
    configure: Configure,
) -> None:
    """Two are reserved for other users, and one for other endpoints of the user."""
    settings = settings_of(configure(dispatcher_concurrency=10, user_unproven_endpoints=10))
    async with ScriptedServer({"rcpt": Wait()}) as server, World(settings) as world:
        for _ in range(12):
            await world.schedule(await world.sender(**by(server)))
        async with running(settings) as dispatcher:
            await eventually(lambda: server.waiting["rcpt"] == 7)
            end(dispatcher, server)


async def test_a_user_whose_endpoints_are_silent_delays_no_other_user(
    configure: Configure, inbox: Inbox
) -> None:
    """Each endpoint is unknown, and none sends a greeting."""
    settings = settings_of(configure())
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(ScriptedServer({"greeting": Wait()})) for _ in range(8)
        ]
        world = await stack.enter_async_context(World(settings))
        hostile = [await world.sender(user="eve", **by(server)) for server in servers]
        honest = await world.sender(user="bert")
        dispatcher = await stack.enter_async_context(running(settings))
        await world.schedule(honest)
        await eventually(lambda: world.done(honest))
        for sender in hostile:
            await world.schedule(sender, 3)
        await eventually(lambda: waiting_for_greeting(servers) == 2)
        await eventually(lambda: all_claimed(world, hostile))

        jobs = await world.schedule(honest, 20)
        newcomer = await world.sender(user="carl", smtp_host="localhost", **of(inbox))
        jobs += await world.schedule(newcomer, 3)
        await eventually(lambda: world.done(honest, newcomer))
        assert jobs_in(inbox.mails).keys() >= set(jobs)
        # No mail to a silent server has ended meanwhile.
        assert waiting_for_greeting(servers) == 2
        dispatcher.stopping.set()
        for server in servers:
            server.cut()


async def test_an_operator_changes_the_slots_for_endpoints_that_have_not_replied(
    configure: Configure,
) -> None:
    """The dispatcher reads the change while it runs."""
    settings = settings_of(configure(dispatcher_concurrency=10, user_unproven_endpoints=1))
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(ScriptedServer({"greeting": Wait()})) for _ in range(4)
        ]
        world = await stack.enter_async_context(World(settings))
        senders = [await world.sender(user="eve", **by(server)) for server in servers]
        dispatcher = await stack.enter_async_context(running(settings))
        for sender in senders:
            await world.schedule(sender)
        await eventually(lambda: all_claimed(world, senders))
        await eventually(lambda: waiting_for_greeting(servers) == 1)
        await world.sql("INSERT INTO users (user_id, unproven_endpoints) VALUES ('eve', 3)")
        await eventually(lambda: waiting_for_greeting(servers) == 3)
        dispatcher.stopping.set()
        for server in servers:
            server.cut()


def of(inbox: Inbox) -> dict[str, Any]:
    port = int(inbox.url.rpartition(":")[2])
    return {"smtp_port": port, "smtp_security": int(SmtpSecurity.NONE)}


def waiting_for_greeting(servers: list[ScriptedServer]) -> int:
    return sum(server.waiting["greeting"] for server in servers)


async def test_claims_beyond_the_limit_of_waiters_take_no_reserved_slot(
    configure: Configure, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "MAX_WAITING", 2)
    settings = settings_of(configure())
    async with ScriptedServer({"rcpt": Wait()}) as server, World(settings) as world:
        sick = [await world.sender(gap_ms=1, **by(server)) for _ in range(12)]
        well = await world.sender()
        async with running(settings) as dispatcher:
            await world.schedule(well)
            await eventually(lambda: world.done(well))
            for sender in sick:
                await world.schedule(sender, 2)
            await eventually(lambda: all_claimed(world, sick))
            await eventually(lambda: server.waiting["rcpt"] == 2)
            jobs = await world.schedule(well, 10)
            await eventually(lambda: world.done(well))
            assert jobs_in(inbox.mails).keys() >= set(jobs)
            assert server.waiting["rcpt"] == 2
            # This ends the hanging mails. A claim that waited may begin before the drain does.
            await server.stop()
            await dispatcher.drain()
            assert not any([await world.leases_in_redis(sender) for sender in sick])
        await world.check_counts()
