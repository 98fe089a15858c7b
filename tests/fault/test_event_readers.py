"""Readers of events that die, while dispatchers are killed: no change is lost or made up."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import grpc
from outbox.v1.email_job_event_pb2 import EmailJobEvent
from outbox.v1.email_job_event_service_pb2 import WatchEmailJobsRequest

from outbox_server.shared.states import JobState
from tests.dispatchers import options, process, running, settings_of
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, running_scheduler
from tests.smtp_servers import Say, ScriptedServer
from tests.world import World

# A reader dies once for so many events, however few messages they arrive in.
_EVENTS_OF_A_LIFE = 10


class MortalReader:
    """Reads events, and now and then dies before it has stored what it read."""

    def __init__(self, scheduler: Scheduler, user_id: str) -> None:
        self._scheduler = scheduler
        self._user_id = user_id
        self._token = ""
        self.stored: list[EmailJobEvent] = []
        self.deaths = 0

    async def run(self) -> None:
        while True:
            await self._live()
            self.deaths += 1

    async def _live(self) -> None:
        request = WatchEmailJobsRequest(user_id=self._user_id, resume_token=self._token)
        async with grpc.aio.insecure_channel(self._scheduler.address) as channel:
            stream = type(self._scheduler)(
                channel, self._scheduler.settings, self._scheduler.address
            ).events.WatchEmailJobs(request)
            async for message in stream:
                read = len(self.stored) + len(message.email_job_events)
                if read >= _EVENTS_OF_A_LIFE * (self.deaths + 1):
                    return
                self.stored += message.email_job_events
                self._token = message.resume_token

    def ids(self) -> set[int]:
        return {int(event.email_job_event_id) for event in self.stored}

    def by_job(self) -> dict[int, list[EmailJobEvent]]:
        found = defaultdict(list)
        for event in self.stored:
            if event.email_job_id:
                found[int(event.email_job_id)].append(event)
        return found


async def test_the_events_are_what_happened_although_readers_and_dispatchers_die(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    # Some mails are refused for now, some for ever.
    plan = {"rcpt": [*[Say("451 later"), Say("550 no such user")] * 4]}
    async with (
        ScriptedServer(plan) as server,
        running_scheduler(database_url, redis_url, min_gap="0") as scheduler,
    ):
        values = options(database_url, redis_url, server.url)
        async with World(settings_of(values)) as world:
            senders = [await world.sender(), await world.sender()]
            (owner,) = {
                row.user_id for row in await world.sql("SELECT DISTINCT user_id FROM senders")
            }
            reader = MortalReader(scheduler, owner)
            reading = asyncio.create_task(reader.run())
            await eventually(lambda: bool(reader._token))
            jobs: list[int] = []
            for _ in range(3):
                jobs += [job for sender in senders for job in await world.schedule(sender, 15)]
                # It dies with mails in flight, whose leases expire.
                async with process(values | {"lease": "1s"}, tmp_path / "log") as dispatcher:
                    count = len(server.taken)
                    await eventually(lambda count=count: len(server.taken) > count + 4)  # type: ignore[misc]
                    await dispatcher.kill()
            [waiting] = await world.schedule(senders[0], 1, due=timedelta(hours=1))
            jobs.append(waiting)
            await world.cancel([waiting])
            async with running(settings_of(values)):
                await eventually(world.done)

            recorded = {row.id for row in await world.sql("SELECT id FROM job_events")}
            await eventually(lambda: reader.ids() >= recorded)
            assert reader.ids() == recorded
            reading.cancel()
            assert reader.deaths == len(recorded) // _EVENTS_OF_A_LIFE > 2
            events = reader.by_job()
            assert events.keys() == set(jobs)
            for job, found in events.items():
                ids = [int(event.email_job_event_id) for event in found]
                assert ids == sorted(set(ids)), "a job's events are out of order, or come twice"
                assert found[-1].state == (await world.job(job)).state
                # One event for each attempt that ended, and one for a cancellation.
                attempts = [attempt.attempt for attempt in await world.attempts(job)]
                expected = [*attempts, 0] if job == waiting else attempts
                assert [event.attempt_count for event in found] == expected
            assert (await world.states())[JobState.CANCELLED] == 1
            assert len([event for event in reader.stored if not event.email_job_id]) == 7
