"""The backup and the restore of docs/operating.md, with the real pg_dump and pg_restore."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from outbox.v1 import email_job_pb2, email_job_service_pb2

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.wheels import postgres_binaries
from outbox_server.shared.agreed.storage import change_agreed
from outbox_server.shared.agreed.values import AgreedValues
from outbox_server.shared.states import JobState
from tests.conftest import Stores
from tests.dispatchers import options, running, settings_of
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import running_scheduler
from tests.world import World, jobs_in


async def postgres_tool(stores: Stores, name: str, *words: str) -> None:
    binaries = stores.postgres._binaries or postgres_binaries()
    process = await asyncio.create_subprocess_exec(
        binaries / name, *words, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(PATIENCE):
        _, complaint = await process.communicate()
    assert process.returncode == 0, complaint.decode()


@dataclass
class Restored:
    """An installation from a dump that was made while mail was being sent."""

    url: str
    # The SENT jobs of the dump, and all jobs of the dump.
    sent: set[int]
    jobs: set[int]
    # The jobs that had arrived when the first installation failed.
    arrived: set[int]
    # A job that is due long after the failure.
    later: int


@pytest.fixture
def values(database_url: str, redis_url: str, inbox: Inbox) -> dict[str, str]:
    """The settings of the installation that fails."""
    return options(database_url, redis_url, inbox.url, min_gap="20ms")


@pytest.fixture
async def restored(
    values: dict[str, str],
    stores: Stores,
    inbox: Inbox,
    tmp_path: Path,
    new_database: Callable[[], str],
) -> Restored:
    dump = tmp_path / "outbox.dump"
    settings = settings_of(values)
    async with World(settings) as world:
        async with running(settings):
            senders = [await world.sender() for _ in range(4)]
            for sender in senders:
                await world.schedule(sender, 25)
            (later,) = await world.schedule(senders[0], 1, due=timedelta(days=1))
            await eventually(lambda: len(inbox.mails) >= 20)
            source = values["database_url"].replace("outbox@", "postgres@")
            await postgres_tool(stores, "pg_dump", "-Fc", "-f", str(dump), source)
            at_dump = len(inbox.mails)
            await eventually(lambda: len(inbox.mails) >= at_dump + 20)
        # The first installation fails here and is not used again.
        await world.redis.flushall()
    url = new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    target = url.replace("outbox@", "postgres@")
    await postgres_tool(stores, "pg_restore", "-d", target, "--exit-on-error", str(dump))
    with psycopg.connect(url, autocommit=True) as connection:
        rows = connection.execute("SELECT id, state FROM email_jobs").fetchall()
    return Restored(
        url,
        {job for job, state in rows if state == JobState.SENT},
        {job for job, _ in rows},
        set(jobs_in(inbox.mails)),
        later,
    )


@asynccontextmanager
async def restarted(restored: Restored, redis_url: str, inbox: Inbox) -> AsyncIterator[World]:
    """Run a dispatcher on the restored database until no due job waits."""
    values = options(restored.url, redis_url, inbox.url, min_gap="20ms", lease="2s")
    async with World(settings_of(values)) as world:
        # The backup has the stored settings too.
        async with world.engine.begin() as connection:
            stored = AgreedValues.from_settings(world.settings)
            await change_agreed(connection, {"uncertain_policy": "hold"}, stored, "test")

        async def all_ended() -> bool:
            # Only the job for tomorrow still waits.
            return len(await world.in_state(JobState.SCHEDULED, JobState.SENDING)) == 1

        async with running(settings_of(values)):
            await eventually(all_ended)
            yield world


async def test_a_restored_backup_sends_mail_that_it_does_not_record_as_sent(
    restored: Restored, redis_url: str, inbox: Inbox
) -> None:
    assert restored.arrived - restored.sent, "nothing was sent after the dump"
    async with restarted(restored, redis_url, inbox) as world:
        arrivals = jobs_in(inbox.mails)
        held = await world.in_state(JobState.UNCERTAIN)
        # No job of the backup is lost.
        assert restored.jobs - {restored.later} <= set(arrivals) | held
        # Mail recorded as sent in the backup is not sent again. Mail sent after the backup is sent
        # twice.
        again = {job for job, times in arrivals.items() if times > 1}
        assert again == restored.arrived - restored.sent - held
        assert max(arrivals.values()) <= 2
        await world.check_counts()


async def test_mail_that_may_have_been_sent_after_the_backup_can_be_cancelled_first(
    restored: Restored, redis_url: str, inbox: Inbox
) -> None:
    before = jobs_in(inbox.mails)
    async with running_scheduler(restored.url, redis_url) as scheduler:
        waiting = email_job_service_pb2.ListEmailJobsRequest(
            user_id="anna", state=email_job_pb2.EMAIL_JOB_STATE_SCHEDULED, page_size=1000
        )
        listed = (await scheduler.jobs.ListEmailJobs(waiting)).email_jobs
        now = scheduler.value("SELECT now()")
        due = [job for job in listed if job.schedule_time.ToDatetime(now.tzinfo) <= now]
        assert len(due) == len(listed) - 1
        cancel = scheduler.jobs.CancelEmailJob
        request_of = email_job_service_pb2.CancelEmailJobRequest
        for start in range(0, len(due), 5):
            some = due[start : start + 5]
            await asyncio.gather(
                *(cancel(request_of(email_job_id=job.email_job_id)) for job in some)
            )
    async with restarted(restored, redis_url, inbox) as world:
        assert jobs_in(inbox.mails) == before
        assert await world.in_state(JobState.SCHEDULED) == {restored.later}
        await world.check_counts()
