"""A dispatcher or Redis has a wrong wall clock: mail is due by PostgreSQL's clock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.deploy.drill.clocks import clock_off_by
from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.valkey import ValkeyServer
from outbox_server.services.dispatcher import storage
from outbox_server.shared.queue.records import Claim
from outbox_server.shared.states import JobState
from tests.dispatchers import options, process, running, settings_of
from tests.eventually import eventually
from tests.world import World, gap_of, jobs_in, mails_of, most_of


@pytest.fixture
def faketime() -> str:
    """The library that gives a process a different wall clock, from Debian's package faketime."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    assert found, "libfaketime is missing: apt-get install faketime"
    return str(found[0])


@pytest.mark.parametrize("offset", [timedelta(hours=1), timedelta(hours=-1)])
async def test_a_dispatcher_whose_clock_is_an_hour_off_breaks_no_limit_and_records_true_times(
    database_url: str,
    redis_url: str,
    inbox: Inbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    faketime: str,
    offset: timedelta,
) -> None:
    values = options(database_url, redis_url, inbox.url, min_gap="50ms", rate_window="1s")
    settings = settings_of(values)
    async with World(settings) as world:
        sender, later = await world.sender(limit=5), await world.sender()
        jobs = await world.schedule(sender, 12)
        # Due in half an hour: one of the wrong clocks is already past that time.
        waiting = await world.schedule(later, due=timedelta(minutes=30))
        began = time.time()
        with monkeypatch.context() as patch:
            # Only the wall clock is changed: the monotonic clock counts from the start of the
            # machine.
            patch.setenv("LD_PRELOAD", faketime)
            patch.setenv("FAKETIME", f"{int(offset.total_seconds()):+d}s")
            patch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            patch.setenv("FAKETIME_NO_CACHE", "1")
            async with process(values, tmp_path / "log", execute=True) as child:
                await eventually(lambda: world.done(sender))
                assert await child.terminate() == 0

        assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
        assert gap_of(inbox.mails, sender) >= 0.05
        assert most_of(inbox.mails, sender, timedelta(seconds=1)) <= 5
        assert await world.in_state(JobState.SCHEDULED) == set(waiting)
        for job in jobs:
            [attempt] = await world.attempts(job)
            assert began - 1 < attempt.started_at <= attempt.ended_at < time.time() + 1
        # Only the Date header shows the dispatcher's own clock.
        data = (inbox.maildir / "new" / inbox.mails[0].file).read_text()
        date = next(line for line in data.splitlines() if line.startswith("Date: "))
        shown = parsedate_to_datetime(date.removeprefix("Date: ")) - datetime.now(UTC)
        assert abs(shown - offset) < timedelta(minutes=1)


async def test_a_redis_whose_clock_is_five_minutes_ahead_hands_out_no_mail_early(
    database_url: str, inbox: Inbox, tmp_path: Path, faketime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []
    explain = storage.explain_unmarked

    async def count(connection: AsyncConnection, claims: Sequence[Claim], *, shard: int) -> Any:
        refused.extend(claim.job.job_id for claim in claims)
        return await explain(connection, claims, shard=shard)

    monkeypatch.setattr(storage, "explain_unmarked", count)
    server = ValkeyServer(tmp_path / "redis")
    server.environment = clock_off_by(Path(faketime), 300)
    await server.start()
    values = options(database_url, server.url, inbox.url, min_gap="20ms", rate_window="1s")
    settings = settings_of(values)
    try:
        async with World(settings) as world, running(settings):
            limited, many = await world.sender(limit=5), await world.sender()
            jobs = await world.schedule(many, 20, due=timedelta(seconds=3))
            jobs += await world.schedule(limited, 8)
            # Redis' clock is ahead, so the limits hold by any clock.
            await eventually(world.done)

            assert jobs_in(inbox.mails) == dict.fromkeys(jobs, 1)
            assert gap_of(inbox.mails, many) >= 0.02
            assert most_of(inbox.mails, limited, timedelta(seconds=1)) <= 5
            for job in jobs:
                [attempt] = await world.attempts(job)
                assert attempt.started_at >= (await world.job(job)).scheduled_at.timestamp()
            due = (await world.job(jobs[0])).scheduled_at.timestamp()
            first = min(mail.started_at for mail in mails_of(inbox.mails, many))
            assert due <= first
            # Each job was handed out too early at most a few times, not all the time.
            assert len(refused) <= 3 * len(jobs)
    finally:
        await server.stop()
