"""Stores small batches in groups: those that arrive during one transaction share the next one.

A commit waits for the disk, and most statements cost the same for one batch as for ten. So a group
is faster than its batches one by one, and a call that arrives alone waits for no other.

`group_queue` decides which calls form a group. Two groups may be written at the same time.

Each call of a group has its own result. An error that concerns one call alone (its quota, its
request_id) fails only that call. If the transaction fails, no call of the group has been accepted,
and each of them is stored alone, so that only the faulty ones fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

import structlog

from outbox_server.services.scheduler.copy_format import Schedule, job_values
from outbox_server.services.scheduler.group_queue import GroupQueue
from outbox_server.services.scheduler.small_batches import SmallBatch
from outbox_server.services.scheduler.storage.batches import BatchRecord, accepted_change
from outbox_server.services.scheduler.storage.checking import unstored_batch
from outbox_server.services.scheduler.storage.group_intake import (
    GroupCall,
    GroupedBatch,
    GroupIntakeStore,
    GroupTransaction,
    LockedSender,
    OpenJobs,
)
from outbox_server.services.scheduler.storage.new_batches import (
    BegunBatch,
    IntakeCounts,
    IntakeSender,
    KnownRequest,
    batch_values,
)
from outbox_server.shared.database.audit_events import RecordedChange
from outbox_server.shared.database.engine import DATABASE_ERRORS, unix_ms
from outbox_server.shared.errors import OutboxError
from outbox_server.shared.fair_shares import Claimant
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.records import NewJobs
from outbox_server.shared.sender_domains import check_sender_domain
from outbox_server.shared.states import SuppressionForm
from outbox_server.shared.turns import REST_RATIO

# How many groups a call joins, at most, while its user or request is locked.
_TRIES: Final = 3
# The longest rest after a group of claimants with many calls, in seconds.
_LONGEST_REST_S: Final = 0.06
# For how long such a group waits for one of others that is being written, in seconds.
_GIVES_WAY_S: Final = 0.01
# The longest time that a group may take, so that later calls do not wait for ever.
_GROUP_LIMIT: Final = timedelta(seconds=10)
# A rollback is quick. One that takes longer must not delay the end of the process.
_END_LIMIT: Final = timedelta(seconds=5)
_MILLISECOND: Final = timedelta(milliseconds=1)

_log = structlog.get_logger("outbox.intake")


@dataclass(slots=True)
class StoredBatch:
    """A batch that was committed, or the one that has the same `request_id`."""

    sender: IntakeSender
    record: BatchRecord | None = None
    known: KnownRequest | None = None
    # None means that no job was accepted.
    new: NewJobs | None = None
    # Whether the new jobs are in Redis, once this is known.
    loaded: asyncio.Future[bool | None] | None = None


# The result of a call of a group. None means that the batch must be stored alone, by
# `Intake.accept`.
_Outcome = StoredBatch | OutboxError | None


class _NotCountedError(Exception):
    """The open jobs of the user must be counted exactly, which only `Intake.accept` does."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """A call that waits for its group."""

    batch: SmallBatch
    # The user that the call acts for. None means any.
    user_id: str | None
    claimant: Claimant
    # Who asks for it, for the audit log.
    change: RecordedChange
    trace_parent: str | None
    result: asyncio.Future[StoredBatch | None] = field(repr=False)
    tries: int = 0

    @property
    def request_id(self) -> str:
        return self.batch.options.request_id

    @property
    def row_count(self) -> int:
        return len(self.batch.rows)

    @property
    def has_left(self) -> bool:
        return self.result.done()


class GroupCommit:
    """Writes groups, one after the other, as long as calls wait."""

    def __init__(
        self,
        store: GroupIntakeStore,
        add: Callable[[int, NewJobs], asyncio.Future[bool | None]],
        *,
        restrict_domains: bool = False,
    ) -> None:
        """`add` begins to add committed jobs to the head of a sender.

        With `restrict_domains`, senders need an address in a domain of their user.
        """
        self._store = store
        self._add = add
        self._restrict_domains = restrict_domains
        self._queue: GroupQueue[_Waiting] = GroupQueue()
        # They write the groups of claimants with many waiting calls (True), and those of others.
        self._writers: dict[bool, asyncio.Task[None]] = {}

    async def store(
        self,
        batch: SmallBatch,
        user_id: str | None,
        claimant: Claimant,
        change: RecordedChange,
        trace_parent: str | None = None,
    ) -> StoredBatch | None:
        """Store a batch with the next group. Return None if it must be stored alone instead.

        If the call is cancelled while its group is written, the batch may have been accepted.

        Raises:
            ResourceExhausted: USER_WAITING_JOBS_EXCEEDED.
            PermissionDenied: SENDER_DOMAIN_NOT_ALLOWED.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[StoredBatch | None] = loop.create_future()
        waiting = _Waiting(batch, user_id, claimant, change, trace_parent, result)
        self._queue.add(waiting, loop.time())
        self._begin_writing()
        return await result

    async def close(self) -> None:
        """Wait until the last groups are written."""
        end = asyncio.get_running_loop().time() + _END_LIMIT.total_seconds()
        while self._writers:
            left = end - asyncio.get_running_loop().time()
            _, late = await asyncio.wait(self._writers.values(), timeout=max(left, 0))
            for task in late:
                task.cancel()
                await asyncio.wait([task])
        await self._store.close()

    def _begin_writing(self) -> None:
        """Begin to write the groups that can be formed, unless that is being done."""
        for many in (False, True):
            if many not in self._writers and self._queue.has_group(many=many):
                # The task has an empty context, because a group belongs to many calls.
                self._writers[many] = asyncio.create_task(
                    self._write_all(many=many), context=Context()
                )

    async def _write_all(self, *, many: bool) -> None:
        queue, now = self._queue, asyncio.get_running_loop().time
        group: list[_Waiting] = []
        try:
            while queue.has_group(many=many):
                try:
                    async with self._store.connection() as connection:
                        while True:
                            if many:
                                await self._give_way()
                            group = queue.next_group(now(), many=many)
                            if not group:
                                break
                            began = now()
                            async with (
                                asyncio.timeout(_GROUP_LIMIT.total_seconds()),
                                self._store.begin(connection) as transaction,
                            ):
                                outcomes = await self._write(transaction, group)
                            self._end(group, outcomes)
                            queue.end_group(many=many)
                            self._begin_writing()
                            if many and queue.several_call(now()):
                                # Others need the event loop and PostgreSQL as well.
                                rest = REST_RATIO * (now() - began)
                                await asyncio.sleep(min(rest, _LONGEST_REST_S))
                except Exception as error:  # noqa: BLE001 - each call finds out by itself
                    _log.warning(
                        "group_not_stored",
                        calls=len(group),
                        error=type(error).__name__,
                        exc_info=not isinstance(error, DATABASE_ERRORS),
                    )
                    # If there was no connection, no group was formed yet.
                    group = group or queue.next_group(now(), many=many)
                    self._end(group, [None] * len(group))
                    group = []
                    queue.end_group(many=many)
                    # Callers who had many calls in this group may have few now.
                    self._begin_writing()
        except BaseException:
            # The task is cancelled or has a bug. No call may wait for ever.
            left = [*group, *queue.take_all()]
            self._end(left, [None] * len(left))
            raise
        finally:
            queue.end_group(many=many)
            del self._writers[many]
            self._begin_writing()

    async def _give_way(self) -> None:
        """Wait while a group of claimants with few calls is written, but not for long."""
        writer = self._writers.get(False)
        if writer is not None:
            await asyncio.wait([writer], timeout=_GIVES_WAY_S)

    def _end(self, group: Sequence[_Waiting], outcomes: Sequence[_Outcome]) -> None:
        """Give the calls of a group their results, after the commit."""
        for each, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, StoredBatch) and outcome.new is not None:
                # Even if the caller has left. All calls of a group are added together, because they
                # share markers.
                outcome.loaded = self._add(outcome.sender.sender_id, outcome.new)
            if each.result.done():  # the caller has left
                continue
            if isinstance(outcome, OutboxError):
                each.result.set_exception(outcome)
            else:
                each.result.set_result(outcome)

    async def _write(
        self, transaction: GroupTransaction, group: list[_Waiting]
    ) -> Sequence[_Outcome]:
        """Write a group. Calls that would have to wait for a lock leave it."""
        calls = [
            GroupCall(each.batch.options.sender_id, each.request_id, each.user_id) for each in group
        ]
        found = await transaction.lock(calls)
        locked = {number: sender for number, sender in found.items() if sender.locked}
        if not locked:
            return self._without_locks(group, found, {})
        owners = {number: sender.sender.user_id for number, sender in locked.items()}
        known, suppressing = await transaction.known_requests(
            {(owners[number], group[number].request_id) for number in locked}
        )
        keys = {
            (user, key)
            for number, user in owners.items()
            if user in suppressing
            for both in group[number].batch.keys
            for key in both
        }
        suppressed = await transaction.suppressed(keys) if keys else set()
        waiting = await transaction.open_counts(set(owners.values()))
        outcomes: dict[int, _Outcome] = {}
        written: list[tuple[GroupedBatch, StoredBatch]] = []
        for number, sender in locked.items():
            each = group[number]
            replayed = known.get((sender.sender.user_id, each.request_id))
            if replayed is not None:
                outcomes[number] = StoredBatch(sender.sender, known=replayed)
                continue
            try:
                batch, record = self._prepare(each, sender, suppressed, waiting)
            except OutboxError as error:
                outcomes[number] = error
            except (OverflowError, _NotCountedError):  # or a time beyond the year 9999
                outcomes[number] = None
            else:
                written.append((batch, stored := StoredBatch(sender.sender, record)))
                outcomes[number] = stored
        if written:
            markers = await transaction.write([batch for batch, _ in written])
            for batch, stored in written:
                if batch.jobs:
                    stored.new = NewJobs(_dues(batch), markers[stored.sender.sender_id])
        return self._without_locks(group, found, outcomes)

    def _without_locks(
        self,
        group: list[_Waiting],
        found: Mapping[int, LockedSender],
        outcomes: Mapping[int, _Outcome],
    ) -> Sequence[_Outcome]:
        """Let calls that lack a lock wait for the next group. Return the outcomes of the others."""
        again = []
        for number, each in enumerate(group):
            each.tries += 1
            if number in found and not found[number].locked and each.tries < _TRIES:
                again.append(number)
        self._queue.put_back([group[number] for number in again])
        rest = [number for number in range(len(group)) if number not in again]
        group[:] = [group[number] for number in rest]
        return [outcomes.get(number) for number in rest]

    def _prepare(
        self,
        each: _Waiting,
        found: LockedSender,
        suppressed: set[tuple[str, str, int | None]],
        waiting: Mapping[str, OpenJobs],
    ) -> tuple[GroupedBatch, BatchRecord]:
        """Return what is written of a batch, and the batch; count its jobs in `waiting`.

        Raises:
            ResourceExhausted: USER_WAITING_JOBS_EXCEEDED.
            PermissionDenied: SENDER_DOMAIN_NOT_ALLOWED.
            OverflowError: a time is beyond the year 9999.
            _NotCountedError: the user may have too many open jobs.
        """
        sender, options, user = found.sender, each.batch.options, found.sender.user_id
        if self._restrict_domains:
            check_sender_domain(sender.email, sender.domains, user)
        rows = [
            row
            for row, (exact, folded) in zip(each.batch.rows, each.batch.keys, strict=True)
            if (user, exact, SuppressionForm.EXACT) not in suppressed
            and (user, folded, None) not in suppressed
        ]
        refusal = found.quotas.exceeded("waiting_jobs", user, waiting[user].count, len(rows))
        if rows and refusal is not None:
            raise refusal if waiting[user].exact else _NotCountedError
        start = max(options.schedule_time or found.now, found.now)
        schedule = Schedule(start, found.now, options.spacing_ms, options.expire_after_ms)
        times = schedule.times(rows)
        batch_id = self._store.ids.issue()
        first = self._store.ids.issue(len(rows)) if rows else 0
        jobs = job_values(rows, times, first, batch_id, options.sender_id, user_id=user)
        waiting[user].count += len(rows)
        counts = IntakeCounts(
            accepted=len(rows),
            duplicate=each.batch.duplicates,
            suppressed=len(each.batch.rows) - len(rows),
        )
        values = {
            "id": batch_id,
            "request_hash": each.batch.digest,
            "start_at": start,
            "last_due_at": schedule.last_due,
            "spacing_ms": options.spacing_ms,
            "accepted_count": counts.accepted,
            "duplicate_count": counts.duplicate,
            "suppressed_count": counts.suppressed,
            **batch_values(
                options,
                user,
                each.batch.variable_names,
                each.batch.email_column,
                each.trace_parent,
            ),
            "row_labels": any(row.tags.labels for row in rows if row.tags),
        }
        record = unstored_batch(
            options,
            BegunBatch(batch_id, start, found.now),
            counts,
            user_id=user,
            email_column=each.batch.email_column,
            spacing=options.spacing_ms * _MILLISECOND,
            last_due=schedule.last_due,
        )
        return GroupedBatch(values, jobs, accepted_change(each.change, record)), record


def _dues(batch: GroupedBatch) -> list[tuple[JobRef, int]]:
    """Return the first attempt at each job, with its due time in Unix ms."""
    return [
        (JobRef(job["id"], 1), unix_ms(datetime.fromisoformat(job["scheduled_at"])))
        for job in batch.jobs
    ]
