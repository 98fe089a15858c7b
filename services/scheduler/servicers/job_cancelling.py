"""Cancels single jobs. Calls that arrive at the same time share one transaction.

A commit waits for the disk, and each statement costs nearly the same for one job as for many. So
hundreds of calls take as long as a few. A call is made alone if somebody else has locked its job,
if another call of the group has its `request_id`, or if the transaction of the group failed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Final, TypeAlias

import structlog
from outbox.v1 import email_job_pb2, email_job_service_pb2
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.changes import (
    AskedChange,
    Changes,
    Made,
    record_all,
    replayed,
)
from outbox_server.services.scheduler.servicers.calls import acting_user
from outbox_server.services.scheduler.servicers.job_mapping import changed_job, to_job
from outbox_server.services.scheduler.storage import cancelling, email_jobs
from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.services.scheduler.storage.email_jobs import JobRecord
from outbox_server.services.scheduler.storage.reopening import retry_job, unwritten_retries
from outbox_server.shared.callers import current_claimant, pause_turn, take_turn
from outbox_server.shared.coalesced import Coalesced
from outbox_server.shared.database.change_requests import find_requests
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.database.ownership import bind_call
from outbox_server.shared.errors import FailedPrecondition, OutboxError
from outbox_server.shared.rpc.proto_mapping import id_text, not_found, parse_id
from outbox_server.shared.states import JobState

# How often a cancellation is tried, because the job may return from a failed attempt meanwhile.
_TRIES: Final = 5
# The longest time that a group may take, so that others need not wait for it for ever.
_GROUP_LIMIT: Final = timedelta(seconds=10)

_log = structlog.get_logger("outbox.jobs")


@dataclass(frozen=True, slots=True)
class _CancelCall:
    """A call that waits for its group. `user_id` None means any user."""

    job_id: int
    user_id: str | None
    asked: AskedChange


@dataclass(frozen=True, slots=True)
class _Cancelled:
    """The result of a call. `sender_id` is the sender whose head must be loaded; 0 means none."""

    made: Made[email_job_pb2.EmailJob]
    sender_id: int = 0
    # Whether an earlier call with the same request_id has made it.
    replayed: bool = False


# The result of a call of a group. A call without a result is made alone.
_Outcome: TypeAlias = _Cancelled | OutboxError


class JobCanceller:
    """Cancels waiting jobs, by their ids."""

    def __init__(
        self,
        engine: AsyncEngine,
        changes: Changes,
        load: Callable[[int], Awaitable[bool]],
        installation_id: Callable[[], Awaitable[str]],
    ) -> None:
        """`load` loads the head of a sender. `installation_id` is for Message-IDs."""
        self._engine = engine
        self._changes = changes
        self._load = load
        self._installation_id = installation_id
        self._groups = Coalesced[_Outcome](self._cancel_group)
        # The calls that wait, by numbers.
        self._calls: dict[int, _CancelCall] = {}
        self._numbers = itertools.count()

    async def close(self) -> None:
        """Wait for the group that is being written."""
        await self._groups.close()

    async def cancel(
        self, request: email_job_service_pb2.CancelEmailJobRequest
    ) -> email_job_pb2.EmailJob:
        """Cancel a waiting job.

        Raises:
            NotFound: EMAIL_JOB_NOT_FOUND.
            FailedPrecondition: TOO_LATE_TO_CANCEL.
            InvalidInput, AlreadyExists: see `Changes.make`.
        """
        user_id = acting_user(request.user_id)
        bind_call(user_id)
        job_id = parse_id(request.email_job_id, "email_job_id")
        number = next(self._numbers)
        asked = self._changes.ask(request, user_id)
        self._calls[number] = _CancelCall(job_id, user_id, asked)
        try:
            pause_turn()
            outcome = await self._groups.get(number, current_claimant())
            await take_turn()
        finally:
            # If the caller has left, its job is not cancelled.
            self._calls.pop(number, None)
        if outcome is None:
            return await self._cancel_alone(request, job_id, user_id)
        if isinstance(outcome, OutboxError):
            raise outcome
        if outcome.sender_id:
            await self._load(outcome.sender_id)
        if outcome.replayed or not asked.key.request_id:
            return outcome.made.answer
        # It is not made in the group, which would wait for another call with this `request_id`.
        return await self._changes.remember(asked, outcome.made, email_job_pb2.EmailJob)

    async def _cancel_group(self, numbers: Sequence[int]) -> Mapping[int, _Outcome]:
        calls = {number: self._calls[number] for number in numbers if number in self._calls}
        try:
            async with asyncio.timeout(_GROUP_LIMIT.total_seconds()):
                installation = await self._installation_id()
                return await in_transaction(
                    self._engine, partial(_write, calls=calls, installation=installation)
                )
        except DATABASE_ERRORS as error:
            _log.warning("group_not_cancelled", calls=len(calls), error=type(error).__name__)
            return {}

    async def _cancel_alone(
        self,
        request: email_job_service_pb2.CancelEmailJobRequest,
        job_id: int,
        user_id: str | None,
    ) -> email_job_pb2.EmailJob:
        installation = await self._installation_id()

        async def cancel(connection: AsyncConnection) -> tuple[bool, JobRecord | None]:
            this = email_jobs.is_job_of(job_id, user_id)
            await cancelling.lock_batches(connection, email_jobs.is_batch_of(this))
            moved = await cancelling.end_waiting(connection, this, JobState.CANCELLED)
            job = await email_jobs.read_job(connection, job_id, user_id)
            if job is not None and await unwritten_retries(connection, [job_id]):
                # Its retry is stored: the job would wait again as soon as the retry is written.
                await retry_job(connection, job.batch_id, job_id)
                moved = await cancelling.end_waiting(connection, this, JobState.CANCELLED)
                job = await email_jobs.read_job(connection, job_id, user_id)
            if moved.jobs and job is not None:
                made = changed_job(to_job(job, installation), JobState.SCHEDULED)
                await self._changes.record_part(connection, request, made)
            return bool(moved.jobs), job

        async def until_final() -> Made[email_job_pb2.EmailJob]:
            for _ in range(_TRIES):
                moved, job = await in_transaction(self._engine, cancel)
                if job is None:
                    raise not_found("email_job_id", request.email_job_id)
                if moved:
                    await self._load(job.sender_id)
                if job.state is JobState.CANCELLED:
                    answer = to_job(job, installation)
                    return changed_job(answer, JobState.SCHEDULED, changed=False)
                if job.state is not JobState.SCHEDULED:
                    raise _too_late(job.job_id, job.state)
            raise _too_late(job_id, JobState.SCHEDULED)

        return await self._changes.make_in_parts(
            request, user_id, email_job_pb2.EmailJob, until_final
        )


async def _write(
    connection: AsyncConnection, calls: Mapping[int, _CancelCall], installation: str
) -> dict[int, _Outcome]:
    """Cancel the jobs of a group of calls. Calls that must be made alone have no outcome."""
    outcomes: dict[int, _Outcome] = {}
    fresh = await _without_repeated(connection, calls, outcomes)
    owners = await email_jobs.read_batches_of(connection, [call.job_id for call in fresh.values()])
    mine: dict[int, _CancelCall] = {}
    for number, call in fresh.items():
        batch_id, owner = owners.get(call.job_id, (0, ""))
        if not batch_id or call.user_id not in (None, owner):
            outcomes[number] = not_found("email_job_id", id_text(call.job_id))
        else:
            mine[number] = call
    if not mine:
        return outcomes
    jobs = {call.job_id: owners[call.job_id][0] for call in mine.values()}
    moved = set(await cancelling.end_unlocked(connection, jobs, JobState.CANCELLED))
    records = await email_jobs.read_jobs(connection, list(jobs))
    failed = [job.job_id for job in records.values() if job.state is JobState.FAILED]
    retried = await unwritten_retries(connection, failed) if failed else set()
    made: list[tuple[AskedChange, Made[email_job_pb2.EmailJob]]] = []
    for number, call in mine.items():
        job = records.get(call.job_id)
        if job is None or job.state is JobState.SCHEDULED or call.job_id in retried:
            # Removed, locked by somebody else, or about to wait again.
            continue
        if job.state is not JobState.CANCELLED:
            outcomes[number] = _too_late(job.job_id, job.state)
            continue
        # If two calls are about one job, only one of them cancels it.
        changed = call.job_id in moved
        moved.discard(call.job_id)
        one = changed_job(to_job(job, installation), JobState.SCHEDULED, changed=changed)
        made.append((call.asked, one))
        outcomes[number] = _Cancelled(one, job.sender_id if changed else 0)
    await record_all(connection, made)
    return outcomes


async def _without_repeated(
    connection: AsyncConnection, calls: Mapping[int, _CancelCall], outcomes: dict[int, _Outcome]
) -> dict[int, _CancelCall]:
    """Return the calls whose requests are new. Store the outcomes of the others."""
    keys = {call.asked.key for call in calls.values() if call.asked.key.request_id}
    known = await find_requests(connection, list(keys)) if keys else {}
    fresh: dict[int, _CancelCall] = {}
    for number, call in calls.items():
        key = call.asked.key
        earlier = known.get((key.scope, key.request_id))
        if earlier is not None and earlier.answer is None:
            # In progress, or another request: made alone, so that it waits or is refused.
            continue
        if earlier is not None:
            try:
                kept = replayed(earlier, call.asked, email_job_pb2.EmailJob)
                outcomes[number] = _Cancelled(Made(kept), replayed=True)
            except OutboxError as error:
                outcomes[number] = error
        elif not key.request_id or key in keys:
            # A second call with this id must find the request of the first one.
            keys.discard(key)
            fresh[number] = call
    return fresh


def _too_late(job_id: int, state: JobState) -> FailedPrecondition:
    return FailedPrecondition(
        f"only a SCHEDULED job can be cancelled; this job is {state.name}",
        reason="TOO_LATE_TO_CANCEL",
        metadata={"email_job_id": id_text(job_id), "state": state.name},
    )
