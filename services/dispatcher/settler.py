"""Settles claims: records their outcomes in PostgreSQL, then in Redis.

Outcomes are written in groups. What arrives while one group is written forms the next group. If the
process dies between the two stores, the leases in Redis expire. Until then they count in the
window, and afterwards the sender's head is loaded again.

When the settings of the installation change, other processes load the next key space of Redis from
PostgreSQL. There too, a send that is in flight meanwhile has a lease, which ends with the send.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.cooling import (
    CooldownRules,
    Signal,
    may_matter,
    record_cooldowns,
)
from outbox_server.services.dispatcher.metrics import DispatcherMetrics
from outbox_server.services.dispatcher.slots import Slots
from outbox_server.services.dispatcher.storage import AttemptRecord, MarkedJob
from outbox_server.shared.database.engine import DATABASE_ERRORS, is_locked
from outbox_server.shared.database.frequent import KeptConnections, driver_within
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.heads.markers import mark_stale
from outbox_server.shared.loops import raise_if_cancelled
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.queue.records import Claim, Contact, LimitUse, Settlement
from outbox_server.shared.states import JobState

_RETRY_S = 0.2
# How long a group waits for the outcomes of the sends that began last, and how many are enough.
_PATIENCE_S = 0.002
_ENOUGH = 16
_NO_SIGNAL = Signal()
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EndedAttempt:
    """An attempt that was made."""

    record: AttemptRecord
    use: LimitUse
    # The key of the sender's user, as in `Claim`.
    user: str = ""
    # What the attempt says about the endpoint, and its name, as in `Settlement`.
    contact: Contact = Contact.NONE
    connection_error: str = ""
    before_mail: bool = False
    server: str = ""
    # What the attempt says about the sender's account.
    signal: Signal = _NO_SIGNAL


@dataclass(frozen=True, slots=True)
class UnsentJob:
    """A marked job that returns to the queue, because its body was not begun.

    `leased` means that Redis still has its lease.
    """

    claim: Claim
    marked: MarkedJob
    leased: bool = True


@dataclass(frozen=True, slots=True)
class UnmarkedClaim:
    """A claim whose job was not marked.

    `waits` means that the job still waits, as far as is known, and returns to the queue: PostgreSQL
    failed, there was no permit, or it is locked or not due. Otherwise it must not be sent: it is
    cancelled or sent already. `unknown` means that PostgreSQL has no such job of this sender, so
    that the sender's whole head may be wrong.
    """

    claim: Claim
    waits: bool = False
    unknown: bool = False


ClaimOutcome = EndedAttempt | UnsentJob | UnmarkedClaim


@dataclass(frozen=True, slots=True)
class _Recorded:
    """What PostgreSQL answered when it recorded a group of outcomes.

    `dues` has the due time (Unix ms) of each job that changed its state. `cooldowns` is the result
    of `record_cooldowns`.
    """

    dues: dict[JobRef, int] = field(default_factory=dict)
    cooldowns: dict[JobRef, timedelta] = field(default_factory=dict)


class Settler:
    """Settles claims in groups, and releases the slot of each once PostgreSQL has its outcome."""

    def __init__(
        self,
        statements: AsyncEngine,
        transactions: AsyncEngine,
        loader: HeadLoader,
        slots: Slots,
        rules: CooldownRules,
        *,
        metrics: DispatcherMetrics | None = None,
        confirmed_at: Callable[[], float] = time.monotonic,
        dispatcher: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`confirmed_at` returns since when no change of the settings can be unknown here.

        `dispatcher` returns the number of this process; None while it is unknown.
        """
        self._dispatcher = dispatcher
        self._metrics = metrics or DispatcherMetrics()
        self._confirmed_at = confirmed_at
        # The loaders of later key spaces, and those of them that do not know `_recent` yet.
        self._successors: list[HeadLoader] = []
        self._new_successors: list[HeadLoader] = []
        # What was recorded since `confirmed_at`: a load of the next key space may have missed it.
        self._recent: deque[tuple[float, list[ClaimOutcome], _Recorded]] = deque()
        self._rules = rules
        self._kept = KeptConnections(statements)
        self._transactions = transactions
        self._loader = loader
        self._slots = slots
        self._pending: list[ClaimOutcome] = []
        self._arrived = asyncio.Event()
        # The jobs of the sends that began last and have not ended.
        self._begun: set[JobRef] = set()
        self._complete = asyncio.Event()
        self._closed = False
        self.given_back_count = 0

    def settle(self, outcome: ClaimOutcome) -> None:
        """Settle one claim soon. Its outcome is kept until PostgreSQL has recorded it."""
        self._pending.append(outcome)
        self._arrived.set()
        if self._begun:
            self._begun.discard(_job_of(outcome))
        if not self._begun or len(self._pending) >= _ENOUGH:
            self._complete.set()

    def begin(self, jobs: Iterable[JobRef]) -> None:
        """Note which sends begin now: the outcomes of those that end soon are recorded together."""
        self._begun = set(jobs)

    def follow(self, successor: HeadLoader) -> None:
        """Settle in this key space too from now on, and what it may have missed."""
        self._successors.append(successor)
        self._new_successors.append(successor)
        self._arrived.set()

    def close(self) -> None:
        """Let `run` return once everything is written."""
        self._closed = True
        self._arrived.set()

    async def run(self) -> None:
        """Write outcomes until closed. A group that PostgreSQL cannot record is tried again."""
        async with aclosing(self._kept), asyncio.TaskGroup() as tasks:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                await self._wait_for_more()
                for loader in self._new_successors:
                    tasks.create_task(self._settle_recent(loader))
                self._new_successors = []
                group, self._pending = self._pending, []
                if group:
                    await self._finish(group, tasks)
                if self._closed and not self._pending:
                    return
                raise_if_cancelled()

    async def _wait_for_more(self) -> None:
        """Wait a moment for the outcomes of the sends that began last.

        Sends of one group often end within a millisecond. Recorded one by one, each would pay for
        its own statements, and so would the claims of the slots that they free.
        """
        if not self._begun or len(self._pending) >= _ENOUGH or self._closed:
            return
        self._complete.clear()
        timer = asyncio.get_running_loop().call_later(_PATIENCE_S, self._complete.set)
        await self._complete.wait()
        timer.cancel()

    async def _finish(self, group: list[ClaimOutcome], tasks: asyncio.TaskGroup) -> None:
        """Record a group in PostgreSQL, then in Redis."""
        recorded = await self._until_recorded(group)
        if recorded is None:
            # The others must not wait for the outcome whose row is locked.
            for outcome in group:
                tasks.create_task(self._finish([outcome], tasks))
            return
        # Not awaited: while Redis hangs, the next outcomes must still be recorded before their
        # leases expire. Before the release, so that the next claim finds what this frees.
        tasks.create_task(self._settle_in_redis(group, recorded))
        self._slots.release(len(group))

    async def _record(self, group: list[ClaimOutcome]) -> _Recorded:
        ended = [o for o in group if isinstance(o, EndedAttempt)]
        unsent = [o.marked for o in group if isinstance(o, UnsentJob)]
        recorded = await self._record_ended(ended) if ended else _Recorded()
        dues = recorded.dues
        if unsent or any(_is_stale(outcome, dues) for outcome in group):
            async with self._transactions.begin() as connection:
                moved = await storage.give_back(connection, unsent)
                given = {m.job: moved[m.job.job_id] for m in unsent if m.job.job_id in moved}
                # Only PostgreSQL knows when these jobs are due now. The marker makes some
                # dispatcher load them even if this process dies.
                stale = {_sender_of(o) for o in group if _is_stale(o, dues | given)}
                if stale:
                    await mark_stale(connection, sorted(stale))
            self.given_back_count += len(moved)
            dues |= given
        return recorded

    async def _record_ended(self, ended: list[EndedAttempt]) -> _Recorded:
        records = [outcome.record for outcome in ended]
        if not any(may_matter(outcome.record, outcome.signal) for outcome in ended):
            async with self._kept.connection() as kept:
                moved = await self._settle(kept, records)
            return _Recorded(_dues(records, moved))
        async with self._transactions.begin() as connection:
            async with driver_within(connection) as driver:
                dues = _dues(records, await self._settle(driver, records))
            cooldowns = await record_cooldowns(
                connection,
                [(o.record, o.signal) for o in ended if o.record.job in dues],
                self._rules,
                time.monotonic(),
            )
            if cooldowns:
                # If this process dies before Redis knows, a load of the sender tells it.
                await mark_stale(
                    connection, sorted({r.sender_id for r in records if r.job in cooldowns})
                )
        for outcome in ended:
            wait = cooldowns.get(outcome.record.job)
            if wait is not None:
                self._metrics.cooled(outcome.signal, wait)
        return _Recorded(dues, cooldowns)

    async def _settle(self, connection: Any, records: Sequence[AttemptRecord]) -> dict[int, int]:
        now = time.monotonic()
        return await storage.settle(connection, records, now, dispatcher=self._dispatcher())

    async def _settle_in_redis(self, group: list[ClaimOutcome], recorded: _Recorded) -> None:
        now = time.monotonic()
        while self._recent and self._recent[0][0] < self._confirmed_at():
            self._recent.popleft()
        self._recent.append((now, group, recorded))
        await self._settle_in(self._loader, group, recorded)
        for loader in self._successors:
            await self._settle_later(loader, group, recorded)

    async def _settle_recent(self, loader: HeadLoader) -> None:
        for _, group, recorded in list(self._recent):
            await self._settle_later(loader, group, recorded)

    async def _settle_later(
        self, loader: HeadLoader, group: list[ClaimOutcome], recorded: _Recorded
    ) -> None:
        """Settle in a later key space. Settling twice changes nothing more."""
        # A claim that was not marked never had a lease there.
        ended = [outcome for outcome in group if isinstance(outcome, EndedAttempt)]
        unsent = [outcome for outcome in group if isinstance(outcome, UnsentJob)]
        try:
            senders = {one.record.sender_id for one in ended}
            senders |= {one.claim.sender_id for one in unsent}
            queues = await loader.find_queues(sorted(senders))
            for outcome in unsent:
                # Its claim does not know the lease that a load has brought there.
                claim = outcome.claim
                await queues[claim.sender_id].forget_senders([claim.sender_id])
                if claim.user:
                    await queues[claim.sender_id].forget_user(claim.user)
            if unsent:
                await loader.load({outcome.claim.sender_id for outcome in unsent}, committed=True)
        except (*QUEUE_ERRORS, *DATABASE_ERRORS) as error:
            _log.warning("release_failed", jobs=len(unsent), error=type(error).__name__)
        if ended:
            await self._settle_in(loader, ended, recorded)

    async def _settle_in(
        self, loader: HeadLoader, group: Sequence[ClaimOutcome], recorded: _Recorded
    ) -> None:
        by_queue: dict[int, list[Settlement]] = {}
        stale: set[int] = set()
        now = time.monotonic()
        for outcome in group:
            settlement = _settlement(outcome, recorded, now)
            shard = loader.queue_of(settlement.sender_id).shard
            by_queue.setdefault(shard, []).append(settlement)
            unknown = isinstance(outcome, UnmarkedClaim) and outcome.unknown
            # Without a marker, also for a sender that does not exist: if this process dies, the
            # lease expires, which causes a load.
            if (
                unknown
                or _is_stale(outcome, recorded.dues)
                or _may_have_cooled(outcome, settlement)
            ):
                stale.add(settlement.sender_id)
        lost: set[int] = set()
        for shard, settlements in by_queue.items():
            # The shards may be on different nodes: each is settled, whatever happens to the others.
            try:
                lost.update(await loader.queues[shard].settle(settlements))
            except QUEUE_ERRORS as error:
                _release_failed(len(settlements), error)
        try:
            if stale or lost:
                await loader.load(stale | lost, committed=True)
            if lost:
                await _settle_moved(loader, by_queue, lost)
        except (*QUEUE_ERRORS, *DATABASE_ERRORS) as error:
            _release_failed(len(group), error)

    async def _until_recorded(self, group: list[ClaimOutcome]) -> _Recorded | None:
        """Record a group, however long it takes. None: somebody has locked a row of several."""
        failing = False
        while True:
            try:
                return await self._record(group)
            except DATABASE_ERRORS as error:
                if len(group) > 1 and is_locked(error):
                    return None
                if not failing:
                    _log.warning("outcomes_wait", jobs=len(group), error=type(error).__name__)
                failing = True
                await asyncio.sleep(_RETRY_S)


async def _settle_moved(
    loader: HeadLoader, by_queue: Mapping[int, Sequence[Settlement]], unknown: set[int]
) -> None:
    """Settle claims of senders that were moved to another shard, which the load has found."""
    for shard, settlements in by_queue.items():
        again: dict[Queue, list[Settlement]] = {}
        for settlement in settlements:
            queue = loader.queue_of(settlement.sender_id)
            if settlement.sender_id in unknown and queue.shard != shard:
                again.setdefault(queue, []).append(settlement)
        for queue, moved in again.items():
            await queue.settle(moved)


def _release_failed(jobs: int, error: Exception) -> None:
    # The leases expire by themselves. A Redis that lost data is rebuilt from PostgreSQL.
    _log.warning("release_failed", jobs=jobs, error=type(error).__name__)


def _dues(records: Sequence[AttemptRecord], moved: Mapping[int, int]) -> dict[JobRef, int]:
    return {r.job: moved[r.job.job_id] for r in records if r.job.job_id in moved}


def _is_stale(outcome: ClaimOutcome, dues: dict[JobRef, int]) -> bool:
    """Return whether only PostgreSQL knows when the job is due now.

    That is a job which this try did not move. Either its lease had expired, or an earlier try has
    moved it and the answer was lost with the connection.
    """
    if isinstance(outcome, EndedAttempt):
        return outcome.record.state is JobState.SCHEDULED and outcome.record.job not in dues
    return isinstance(outcome, UnsentJob) and (not outcome.leased or outcome.marked.job not in dues)


def _may_have_cooled(outcome: ClaimOutcome, settlement: Settlement) -> bool:
    """Return whether the sender's cooldown changed, or may have changed.

    It may have if the answer to an earlier try was lost.
    """
    if settlement.cooldown is not None:
        return True
    return isinstance(outcome, EndedAttempt) and may_matter(outcome.record, outcome.signal)


def _job_of(outcome: ClaimOutcome) -> JobRef:
    return outcome.record.job if isinstance(outcome, EndedAttempt) else outcome.claim.job


def _sender_of(outcome: ClaimOutcome) -> int:
    if isinstance(outcome, EndedAttempt):
        return outcome.record.sender_id
    return outcome.claim.sender_id


def _settlement(outcome: ClaimOutcome, recorded: _Recorded, now: float) -> Settlement:
    dues = recorded.dues
    if not isinstance(outcome, EndedAttempt):
        claim = outcome.claim
        due: int | None
        if isinstance(outcome, UnsentJob):
            due = dues.get(claim.job) if outcome.leased else None
        else:
            # It returns to its place in the head. If it no longer waits, the next mark finds out.
            due = claim.due_ms if outcome.waits else None
        return Settlement(
            claim.sender_id,
            claim.job,
            LimitUse.UNUSED,
            user=claim.user,
            next_job=None if due is None else claim.job,
            next_due_ms=due or 0,
            lease_ms=claim.lease_ms,
        )
    record = outcome.record
    due = dues.get(record.job) if record.state is JobState.SCHEDULED else None
    return Settlement(
        record.sender_id,
        record.job,
        outcome.use,
        user=outcome.user,
        age=timedelta(seconds=max(0.0, now - record.ended)),
        next_job=None if due is None else JobRef(record.job.job_id, record.job.attempt + 1),
        next_due_ms=due or 0,
        contact=outcome.contact,
        connection_error=outcome.connection_error,
        before_mail=outcome.before_mail,
        server=outcome.server,
        smtp_code=record.smtp_code,
        cooldown=recorded.cooldowns.get(record.job),
    )
