"""A dispatcher that is stopped under load without enough time for its drain."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from outbox_server.shared.states import AttemptOutcome, JobState
from tests.dispatchers import DispatcherProcess, options, process, running, settings_of
from tests.eventually import PATIENCE, eventually
from tests.smtp_servers import ScriptedServer, Wait
from tests.world import World, jobs_in

End = Callable[[DispatcherProcess], Awaitable[int]]


async def end_of_the_grace(child: DispatcherProcess) -> int:
    # The server hangs for far longer. Only the end of the grace period ends the dispatcher in this
    # time.
    async with asyncio.timeout(PATIENCE):
        return await child.terminate()


async def a_second_signal(child: DispatcherProcess) -> int:
    ending = asyncio.create_task(child.terminate())
    await eventually(child.not_serving)
    child.signal(signal.SIGTERM)
    return await ending


@pytest.mark.parametrize(
    ("end", "grace", "code"),
    [(end_of_the_grace, "300ms", 0), (a_second_signal, "1h", -signal.SIGTERM)],
)
async def test_a_mail_still_in_its_body_after_the_grace_period_is_left_to_its_lease(
    database_url: str, redis_url: str, tmp_path: Path, *, end: End, grace: str, code: int
) -> None:
    async with ScriptedServer({"body": [Wait()]}) as server:
        values = options(
            database_url,
            redis_url,
            server.url,
            lease="3s",
            smtp_timeout="1h",
            shutdown_grace=grace,
        )
        async with World(settings_of(values)) as world:
            sender = await world.sender(max_in_flight=1)
            in_doubt, *rest = await world.schedule(sender, 4)
            async with process(values, tmp_path / "log") as child:
                await eventually(lambda: server.waiting["body"] == 1)
                assert await end(child) == code
            assert await world.in_state(JobState.SCHEDULED) == set(rest)
            async with running(settings_of(values)):
                await eventually(world.done)

            assert await world.states() == {JobState.SENT: 4}
            assert jobs_in(server.taken) == {in_doubt: 2} | dict.fromkeys(rest, 1)
            outcomes = [attempt.outcome for attempt in await world.attempts(in_doubt)]
            assert outcomes == [AttemptOutcome.LEASE_EXPIRED, AttemptOutcome.SENT]
            await world.check_counts()
