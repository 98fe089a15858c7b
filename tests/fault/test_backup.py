"""The backup and the restore of docs/operating.md, with the real pg_dump and pg_restore."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from outbox.v1 import email_job_service_pb2

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.passwords import SUPERUSER
from outbox_server.deploy.embedded.postgres import PostgresServer
from outbox_server.deploy.wheels import postgres_binaries
from outbox_server.shared.states import JobState
from tests.commands import outbox
from tests.conftest import Stores
from tests.dispatchers import DispatcherProcess, options, process, running, settings_of
from tests.eventually import PATIENCE, eventually
from tests.marked_jobs import mark
from tests.scheduler_stack import Scheduler, running_scheduler
from tests.world import World, jobs_in

_SAME_CLUSTER: Final = "the same cluster"
_OTHER_CLUSTER: Final = "another cluster"


async def postgres_tool(stores: Stores, name: str, *words: str) -> None:
    binaries = stores.postgres._binaries or postgres_binaries()
    tool = await asyncio.create_subprocess_exec(
        binaries / name, *words, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(PATIENCE):
        _, complaint = await tool.communicate()
    assert tool.returncode == 0, complaint.decode()


@dataclass
class Restored:
    """An installation from a dump that was made while mail was being sent."""

    url: str
    # The SENT jobs of the dump, and those in SENDING.
    sent: set[int]
    sending: set[int]
    # The arrivals until the first installation failed, by job.
    arrived: Counter[int]
    # A job that is due long after the failure.
    later: int
    # Two senders of Anna's, one of Bert's, and one of Anna's with one job, in SENDING.
    senders: list[int]


@pytest.fixture
async def target(
    request: pytest.FixtureRequest, stores: Stores, new_database: Callable[[], str]
) -> AsyncIterator[str]:
    """An empty database to restore into."""
    if request.param == _SAME_CLUSTER:
        url = new_database()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        yield url
        return
    other = PostgresServer(
        stores.postgres.folder.with_name("restored"),
        durable=False,
        binaries=stores.postgres._binaries,
        system_user=stores.postgres._system_user,
    )
    await other.start()
    try:
        await other.ensure_database()
        yield other.url()
    finally:
        await other.stop()


@pytest.fixture
async def dumped(
    database_url: str, redis_url: str, stores: Stores, inbox: Inbox, tmp_path: Path
) -> tuple[Path, int, list[int]]:
    """A dump that was made while mail was being sent, a job that is due later, and the senders."""
    dump = tmp_path / "outbox.dump"

    def has(count: int) -> bool:
        return len(inbox.mails) >= count

    settings = settings_of(options(database_url, redis_url, inbox.url, min_gap="20ms"))
    async with World(settings) as world:
        senders = [await world.sender(user=user) for user in ("anna", "anna", "bert", "anna")]
        async with running(settings):
            (later,) = await world.schedule(senders[2], 1, due=timedelta(days=2))
            (sending,) = await world.schedule(senders[3], 1, due=timedelta(days=-2), load=False)
            # By a dispatcher that dies.
            async with world.engine.begin() as connection:
                assert await mark(connection, [sending])
            source = database_url.replace("outbox@", f"{SUPERUSER}@")
            at_dump, scheduled = 0, 0
            # With enough mail, some of it is left after the dump on a machine of any speed.
            while at_dump + 15 > scheduled:
                jobs = max(25, scheduled)
                for sender in senders[:3]:
                    await world.schedule(sender, jobs)
                scheduled += 3 * jobs
                await eventually(partial(has, scheduled - 3 * jobs + 15))
                await postgres_tool(stores, "pg_dump", "-Fc", "-f", str(dump), source)
                at_dump = len(inbox.mails)
            await eventually(partial(has, at_dump + 15))
        # The first installation fails here and is not used again.
        await world.redis.flushall()
    return dump, later, senders


@pytest.fixture
async def restored(
    target: str, dumped: tuple[Path, int, list[int]], stores: Stores, inbox: Inbox
) -> Restored:
    dump, later, senders = dumped
    words = ("--no-owner", "--role=outbox", "--exit-on-error")
    admin = target.replace("outbox@", f"{SUPERUSER}@")
    await postgres_tool(stores, "pg_restore", "-d", admin, *words, str(dump))
    with psycopg.connect(target, autocommit=True) as connection:
        # A restore takes longer than a lease.
        connection.execute("UPDATE email_jobs SET lease_until = now() WHERE state = 2")
        rows = connection.execute("SELECT id, state FROM email_jobs").fetchall()
    return Restored(
        target,
        {job for job, state in rows if state == JobState.SENT},
        {job for job, state in rows if state == JobState.SENDING},
        jobs_in(inbox.mails),
        later,
        senders,
    )


async def held(scheduler: Scheduler, *words: str) -> Any:
    """Run a command of `outbox held`; return its JSON."""
    done = await outbox(scheduler, "held", *words, "-o", "json")
    assert done.exit_code == 0, done.stderr
    # The scheduler's log lines are on the same stdout.
    document, _ = json.JSONDecoder().raw_decode(done.stdout)
    return document


@asynccontextmanager
async def held_dispatcher(values: dict[str, str], log: Path) -> AsyncIterator[DispatcherProcess]:
    """Run a dispatcher; it serves, and has said that the installation is held."""
    async with process(values, log) as dispatcher:
        await eventually(dispatcher.serving)
        await eventually(lambda: '"held"' in dispatcher.log())
        yield dispatcher


async def check_shown(scheduler: Scheduler, world: World, restored: Restored) -> None:
    """Check that everything that waits is shown, by state and age, and by sender."""
    waiting = await world.in_state(JobState.SCHEDULED, JobState.SENDING) - restored.sending
    shown = await held(scheduler)
    assert (shown["held"], shown["reason"]) == (True, "HOLD_REASON_RESTORED")
    assert int(shown["job_count"]) == len(waiting) + len(restored.sending) > 10
    groups = {(each["state"], each["age"]): int(each["job_count"]) for each in shown["groups"]}
    in_flight = len(restored.sending) - 1
    assert groups == {
        ("HELD_STATE_SENDING", "HELD_AGE_OVERDUE_DAYS"): 1,
        **({("HELD_STATE_SENDING", "HELD_AGE_OVERDUE"): in_flight} if in_flight else {}),
        ("HELD_STATE_WAITING", "HELD_AGE_OVERDUE"): len(waiting) - 1,
        ("HELD_STATE_WAITING", "HELD_AGE_DUE_LATER"): 1,
    }
    by_sender = {each["sender_id"]: each for each in shown["senders"]}
    assert by_sender.keys() == {str(sender) for sender in restored.senders}
    _, _, third, fourth = (by_sender[str(sender)] for sender in restored.senders)
    assert (third["user_id"], fourth["sending_count"]) == ("bert", "1")
    # For a caller, in words.
    request = email_job_service_pb2.ExplainEmailJobRequest(email_job_id=str(restored.later))
    why = await scheduler.jobs.ExplainEmailJob(request)
    assert why.wait_reason == email_job_service_pb2.WAIT_REASON_HELD


@pytest.mark.parametrize("target", [_SAME_CLUSTER], indirect=True)
async def test_a_dump_that_is_restored_into_the_same_cluster_is_held_too(
    restored: Restored, redis_url: str, inbox: Inbox, tmp_path: Path
) -> None:
    values = options(restored.url, redis_url, inbox.url, min_gap="20ms", lease="2s")
    async with (
        World(settings_of(values)) as world,
        running_scheduler(restored.url, redis_url) as scheduler,
        held_dispatcher(values, tmp_path / "dispatcher.log"),
    ):
        await check_shown(scheduler, world, restored)
        world._numbers = itertools.count(1_000)
        sender = await world.sender(user="carl")
        await held(scheduler, "release", "--sender", str(sender))
        jobs = await world.schedule(sender, 1)
        await eventually(lambda: jobs_in(inbox.mails) - restored.arrived)
        assert jobs_in(inbox.mails) - restored.arrived == dict.fromkeys(jobs, 1)


@pytest.mark.parametrize("target", [_OTHER_CLUSTER], indirect=True)
async def test_after_a_restore_nothing_is_sent_until_it_is_released(
    restored: Restored, redis_url: str, inbox: Inbox, tmp_path: Path
) -> None:
    values = options(restored.url, redis_url, inbox.url, min_gap="20ms", lease="2s")
    first, second, third, _ = restored.senders
    assert restored.arrived.keys() - restored.sent, "nothing was sent after the dump"
    expected: set[int] = set()

    def arrived(*jobs: int) -> bool:
        """Return whether these jobs, and no others than released ones, have arrived again."""
        again = jobs_in(inbox.mails) - restored.arrived
        assert again.keys() <= expected
        assert not again or max(again.values()) == 1
        return again.keys() >= set(jobs)

    async with (
        World(settings_of(values)) as world,
        running_scheduler(restored.url, redis_url) as scheduler,
        held_dispatcher(values, tmp_path / "one.log") as one,
        held_dispatcher(values, tmp_path / "two.log"),
    ):
        # The restored batches have the first request ids.
        world._numbers = itertools.count(1_000)
        await check_shown(scheduler, world, restored)

        # Only the released sender sends, also what is accepted meanwhile.
        rows = await world.sql(
            "SELECT id FROM email_jobs WHERE sender_id = %s AND state < 3", first
        )
        expected |= {row.id for row in rows}
        answer = await held(scheduler, "release", "--sender", str(first))
        assert answer == {"released_count": str(len(rows)), "hold_ended": False}
        await world.schedule(second, 1)
        expected |= {*await world.schedule(first, 1)}
        await eventually(lambda: arrived(*expected))

        # A dispatcher that is killed comes back, and everything else stays held. What it sent is
        # recorded: otherwise it would be in doubt, and sent again.
        await eventually(lambda: world.done(first))
        await one.kill()
        async with held_dispatcher(values, tmp_path / "three.log"):
            expected |= {*(new := await world.schedule(first, 1))}
            await eventually(lambda: arrived(*new))

            # What was SENDING is in doubt. It is sent if it is released.
            expected |= restored.sending
            await held(scheduler, "release", "--state", "sending")
            await eventually(lambda: arrived(*expected))

            # What is cancelled is never sent.
            waiting = (await world.states(second))[JobState.SCHEDULED]
            answer = await held(scheduler, "cancel", "--sender", str(second))
            assert (int(answer["cancelled_count"]), answer["hold_ended"]) == (waiting, False)
            assert (await world.states(second))[JobState.CANCELLED] == waiting > 1
            assert not (await held(scheduler, "--sender", str(second)))["groups"]

            # The hold ends when nothing is held any more.
            await held(scheduler, "cancel", "--user", "bert", "--due-before", "now")
            answer = await held(scheduler, "release", "--due-after", "now")
            assert answer == {"released_count": "1", "hold_ended": True}
            assert (await held(scheduler))["held"] is False
            expected |= {*(new := await world.schedule(third, 1))}
            await eventually(lambda: arrived(*new))

            async def all_recorded() -> bool:
                open_jobs = await world.in_state(JobState.SCHEDULED, JobState.SENDING)
                return open_jobs == {restored.later}

            # Before the dispatcher is killed at the end of its block.
            await eventually(all_recorded)
        assert arrived(*expected)
        await world.check_counts()
