"""Calls that change many jobs, at random, on two schedulers whose connections are cut meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import grpc
import pytest
from outbox.v1 import batch_pb2
from outbox.v1.batch_service_pb2 import (
    PauseBatchRequest,
    ResumeBatchRequest,
    UpdateBatchRequest,
)
from outbox.v1.email_job_service_pb2 import (
    CancelEmailJobRequest,
    CancelEmailJobsRequest,
    ListEmailJobsRequest,
    RescheduleEmailJobsRequest,
    RetryEmailJobsRequest,
)
from outbox.v1.suppression_pb2 import Suppression
from outbox.v1.suppression_service_pb2 import CreateSuppressionRequest
from sqlalchemy.exc import DBAPIError

from outbox_server.services.scheduler.servicers import batch_control
from outbox_server.services.scheduler.storage import job_changes, job_set_rows
from outbox_server.services.scheduler.storage import job_sets as storage
from outbox_server.services.scheduler.storage.respreading import respread_part
from outbox_server.shared.audit.recount import stats_mismatch
from outbox_server.shared.rpc.proto_mapping import to_timestamp
from outbox_server.shared.states import JobState
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.scheduler_stack import Scheduler, running_scheduler
from tests.smtp_servers import Conversation, Say, ScriptedServer, Succeed
from tests.world import World, jobs_in

ROWS: Final = 150
_CALLS: Final = 10
SCHEDULED, CANCELLED = int(JobState.SCHEDULED), int(JobState.CANCELLED)
_AGAIN: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)
_FAR: Final = timedelta(days=9)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_WRITTEN_WITH_THE_CHANGE", 10)
    monkeypatch.setattr(job_set_rows, "ROWS_AT_ONCE", 60)
    monkeypatch.setattr(job_changes, "WRITTEN_AT_ONCE", 8)
    monkeypatch.setattr(job_changes, "MOST_UNWRITTEN", 5)
    monkeypatch.setattr(batch_control, "_RESPREAD_IN_CALL", 10)
    monkeypatch.setattr(respread_part, "__defaults__", (20,))


@dataclass
class RandomCaller:
    """Makes one call after the other about a batch, and remembers what the answers promise."""

    world: World
    schedulers: list[Scheduler]
    dice: random.Random
    user: str
    batch: str
    # The jobs that a reader saw as CANCELLED, and the new due time of those with one.
    cancelled: set[int] = field(default_factory=set)
    due: dict[int, datetime] = field(default_factory=dict)

    async def run(self) -> None:
        calls = [
            *[self.cancel, self.reschedule, self.reschedule, self.delay, self.retry] * 2,
            *(self.update, self.pause, self.cancel_one, self.suppress),
        ]
        for _ in range(_CALLS):
            cut = asyncio.ensure_future(cut_one(self.world, self.dice))
            await self.until_done(self.dice.choice(calls))
            cut.cancel()
            await self.look()

    async def until_done(self, call: Callable[[Scheduler], Awaitable[None]]) -> None:
        """Repeat a call whose connection was cut, on the other scheduler."""
        while True:
            try:
                return await call(self.dice.choice(self.schedulers))
            except grpc.aio.AioRpcError as error:
                # Some of its parts may be stored.
                self.due.clear()
                if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                    return None
                if error.code() not in _AGAIN:
                    raise

    async def in_parts(self, method: Any, request: Any) -> None:
        while True:
            request.page_token = (await method(request)).next_page_token
            if not request.page_token:
                return

    def rows(self) -> str:
        first = self.dice.randint(1, ROWS)
        last = first + self.dice.choice((3, 30, ROWS))
        return f"row_number >= {first} AND row_number <= {last}"

    async def jobs(self, wanted: str) -> list[Any]:
        async def read() -> list[Any]:
            found: list[Any] = []
            request = ListEmailJobsRequest(batch_id=self.batch, filter=wanted, page_size=1000)
            answer = await self.dice.choice(self.schedulers).jobs.ListEmailJobs(request)
            found += answer.email_jobs
            assert not answer.next_page_token
            return found

        while True:
            try:
                return await read()
            except grpc.aio.AioRpcError as error:
                if error.code() not in _AGAIN:
                    raise

    async def look(self) -> None:
        """What was CANCELLED stays so."""
        jobs = await self.jobs("row_number > 0")
        assert len(jobs) == ROWS
        now = {int(job.email_job_id) for job in jobs if job.state == CANCELLED}
        assert self.cancelled <= now
        self.cancelled = now

    async def check_times(self) -> None:
        """The last call decided about each due time."""
        for job in await self.jobs("state = SCHEDULED AND attempt_count = 0"):
            wanted = self.due.get(int(job.email_job_id))
            if wanted is not None and wanted > datetime.now(UTC):
                time = job.schedule_time.ToDatetime(UTC)
                assert abs(time - wanted) < timedelta(seconds=1), (job, wanted)

    async def cancel(self, scheduler: Scheduler) -> None:
        wanted = self.rows()
        if self.dice.random() < 0.3:
            time = (datetime.now(UTC) + timedelta(days=1)).isoformat()
            wanted += f' AND schedule_time > "{time}"'
        request = CancelEmailJobsRequest(batch_id=self.batch, filter=wanted)
        await self.in_parts(scheduler.jobs.CancelEmailJobs, request)
        if "schedule_time" not in wanted:
            left = [job for job in await self.jobs(wanted) if job.state == SCHEDULED]
            # A job in flight may have returned to SCHEDULED.
            assert all(job.attempt_count for job in left), left

    async def reschedule(self, scheduler: Scheduler) -> None:
        wanted = self.rows()
        days = self.dice.choice((0, 1, 2, 3))
        time = datetime.now(UTC) + days * _FAR
        request = RescheduleEmailJobsRequest(
            batch_id=self.batch, filter=wanted, schedule_time=to_timestamp(time)
        )
        await self.in_parts(scheduler.jobs.RescheduleEmailJobs, request)
        for job in await self.jobs(wanted):
            self.due[int(job.email_job_id)] = time

    async def delay(self, scheduler: Scheduler) -> None:
        wanted = self.rows()
        request = RescheduleEmailJobsRequest(batch_id=self.batch, filter=wanted)
        request.delay.FromTimedelta(self.dice.choice((1, -1)) * _FAR)
        for job in await self.jobs(wanted):
            self.due.pop(int(job.email_job_id), None)
        await self.in_parts(scheduler.jobs.RescheduleEmailJobs, request)

    async def retry(self, scheduler: Scheduler) -> None:
        for job in await self.jobs("row_number > 0"):
            if job.attempt_count:
                self.due.pop(int(job.email_job_id), None)
        request = RetryEmailJobsRequest(batch_id=self.batch, filter="row_number > 0")
        await self.in_parts(scheduler.jobs.RetryEmailJobs, request)

    async def update(self, scheduler: Scheduler) -> None:
        time = datetime.now(UTC) + self.dice.choice((0, 4)) * _FAR
        changed = batch_pb2.Batch(batch_id=self.batch, schedule_time=to_timestamp(time))
        await scheduler.batches.UpdateBatch(UpdateBatchRequest(batch=changed))
        for job in await self.jobs("row_number > 0"):
            self.due[int(job.email_job_id)] = time

    async def pause(self, scheduler: Scheduler) -> None:
        await scheduler.batches.PauseBatch(PauseBatchRequest(batch_id=self.batch))
        await self.look()
        await scheduler.batches.ResumeBatch(ResumeBatchRequest(batch_id=self.batch))

    async def cancel_one(self, scheduler: Scheduler) -> None:
        job = self.dice.choice(await self.jobs("row_number > 0")).email_job_id
        await scheduler.jobs.CancelEmailJob(CancelEmailJobRequest(email_job_id=job))

    async def suppress(self, scheduler: Scheduler) -> None:
        address = Suppression(email=f"r{self.dice.randint(1, ROWS)}@b.org")
        request = CreateSuppressionRequest(user_id=self.user, suppression=address)
        await scheduler.suppressions.CreateSuppression(request)


async def check_counts(world: World) -> None:
    """Compare all counts with the rows, in one snapshot, and with one another."""
    async with world.engine.connect() as connection:
        await connection.execution_options(isolation_level="REPEATABLE READ")
        assert await stats_mismatch(connection) == 0


async def cut_one(world: World, dice: random.Random) -> None:
    """End a connection that changes or reads changed jobs, in whichever statement."""

    async def cut() -> bool:
        found = await world.sql(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND state <> 'idle'"
            " AND query ~ 'job_change|batch_respread|FOR NO KEY UPDATE'"
        )
        if found:
            await world.sql("SELECT pg_terminate_backend(%s)", dice.choice(found).pid)
        return bool(found)

    await eventually(cut)


async def check_mail(world: World, server: ScriptedServer, cancelled: set[int]) -> None:
    """Each job was sent once or not at all, as its state and its events say."""
    arrived = jobs_in([mail for mail in server.taken if mail.answered])
    assert set(arrived.values()) <= {1}
    assert set(arrived) == await world.in_state(JobState.SENT)
    assert not cancelled & arrived.keys()
    events = await world.sql("SELECT email_job_id, state FROM job_events WHERE state > 2")
    ended = Counter((event.email_job_id, event.state) for event in events if event.state != 4)
    assert set(ended.values()) == {1}
    states = {row.id: row.state for row in await world.sql("SELECT id, state FROM email_jobs")}
    assert all(states[job] == state for job, state in ended)


async def test_what_answers_promise_is_true_and_nothing_is_held_for_ever(
    database_url: str, redis_url: str
) -> None:
    dice = random.Random(1)

    def refuse(_: Conversation) -> Any:
        return Say("550 no") if dice.random() < 0.2 else Succeed()

    async with (
        ScriptedServer({"rcpt": refuse}) as server,
        running_scheduler(database_url, redis_url, min_gap="0") as one,
        running_scheduler(database_url, redis_url, min_gap="0") as other,
        World(one.settings) as world,
    ):
        values = options(database_url, redis_url, server.url)
        csv = "email\n" + "".join(f"r{n}@b.org\n" for n in range(1, ROWS + 1))
        callers: list[RandomCaller] = []
        for user in ("ann", "bob"):
            sender = await one.sender(user, hourly_limit=1_000_000)
            batch = (await one.schedule(sender, csv)).batch.batch_id
            own = random.Random(dice.random())
            callers.append(RandomCaller(world, [one, other], own, user, batch))

        async def check() -> None:
            while True:
                with suppress(DBAPIError):  # its connection was cut, too
                    await check_counts(world)

        async with running(settings_of(values)):
            async with asyncio.TaskGroup() as group:
                checking = group.create_task(check())
                async with asyncio.TaskGroup() as calling:
                    for caller in callers:
                        calling.create_task(caller.run())
                checking.cancel()
            await eventually(lambda: not one.rows("SELECT 1 FROM job_changes"))
            await eventually(lambda: not one.rows("SELECT 1 FROM batch_respreads"))
            assert not one.rows("SELECT 1 FROM job_change_blocks")
            assert not one.rows("SELECT 1 FROM batches WHERE respreading")
            await check_counts(world)
            for caller in callers:
                await caller.check_times()
            # All mail that still waits is sent.
            for caller in callers:
                request = RescheduleEmailJobsRequest(
                    batch_id=caller.batch, schedule_time=to_timestamp(datetime.now(UTC))
                )
                await caller.in_parts(one.jobs.RescheduleEmailJobs, request)
            await eventually(world.done)
            await check_counts(world)
        cancelled = set[int]().union(*(caller.cancelled for caller in callers))
        await check_mail(world, server, cancelled)
