"""Settles claims, and marks those that follow, in PostgreSQL. Then Redis learns of it.

One turn follows the other. A turn is one statement of PostgreSQL: it records what has ended and
marks what was claimed. What arrives during a turn is the group of the next one. `queue_settler.py`
then settles in Redis what PostgreSQL has recorded.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeGuard

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.cooling import CooldownRules, may_matter, record_cooldowns
from outbox_server.services.dispatcher.ended_claims import (
    ClaimOutcome,
    EndedAttempt,
    Recorded,
    UnmarkedClaim,
    UnsentJob,
    dues_of,
    is_stale,
    job_of,
    sender_of,
)
from outbox_server.services.dispatcher.metrics import DispatcherMetrics
from outbox_server.services.dispatcher.queue_settler import QueueSettler
from outbox_server.services.dispatcher.slots import Slots
from outbox_server.services.dispatcher.storage import AttemptRecord, MarkedJob, Marking
from outbox_server.shared.database.engine import DATABASE_ERRORS, is_locked
from outbox_server.shared.database.frequent import KeptConnections, driver_within
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.heads.markers import mark_stale
from outbox_server.shared.loops import raise_if_cancelled
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.queue.records import Claim

_RETRY_S = 0.2
# How long a group waits for the outcomes of sends that began lately.
_PATIENCE_S = 0.002
# A group that has this part of all slots does not wait. With few slots, the part is larger: each
# group has a fixed cost, so two small groups cost nearly twice as much as one.
_ENOUGH = 0.8
_ENOUGH_OF_MANY = 0.5
_MANY_SLOTS = 20
_LATELY_S = 0.02
# A claim that could not be made earlier does not wait for outcomes. Others wait for a slot anyway.
_FRESH = timedelta(milliseconds=50)
_log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class _MarkRequest:
    """Claims of one life of a shard, and the future that `Settler.mark` returned for them."""

    queue: Queue
    claims: Sequence[Claim]
    marked: asyncio.Future[list[MarkedJob]]

    @property
    def life(self) -> str:
        return self.claims[0].life

    def fail(self, error: Exception) -> None:
        if not self.marked.done():
            self.marked.set_exception(error)


class Settler:
    """Settles and marks claims in groups. A slot is free once PostgreSQL has its outcome."""

    def __init__(
        self,
        statements: AsyncEngine,
        transactions: AsyncEngine,
        loader: HeadLoader,
        slots: Slots,
        rules: CooldownRules,
        *,
        lease: timedelta = timedelta(0),
        seen: Callable[[], int] = lambda: 0,
        hand_over: Callable[[int], None] = lambda _: None,
        metrics: DispatcherMetrics | None = None,
        confirmed_at: Callable[[], float] = time.monotonic,
        dispatcher: Callable[[], int | None] = lambda: None,
    ) -> None:
        """Set up a settler.

        `lease` is that of the claims, and `seen` the number of the newest heartbeat seen.
        `hand_over` is called at the beginning of a turn, with the number of mails that ended and
        will be recorded. The same statement marks the claims for which it calls `mark`.
        `confirmed_at` returns since when no change of the settings can be unknown here.
        `dispatcher` returns the number of this process; None while it is unknown.
        """
        self._dispatcher = dispatcher
        self._lease = lease
        self._seen = seen
        self._hand_over = hand_over
        self._metrics = metrics or DispatcherMetrics()
        self._queue_settler = QueueSettler(loader, confirmed_at)
        # The loaders of later key spaces that have missed what was recorded before `follow`.
        self._new_successors: list[HeadLoader] = []
        self._rules = rules
        self._kept = KeptConnections(statements)
        self._transactions = transactions
        self._slots = slots
        self._pending: list[ClaimOutcome] = []
        self._marks: list[_MarkRequest] = []
        # Whether the mail of one of these claims became eligible just now.
        self._fresh = False
        self._arrived = asyncio.Event()
        # The jobs whose sends began lately and have not ended, and when they began, oldest first.
        self._begun: dict[JobRef, float] = {}
        self._complete = asyncio.Event()
        part = _ENOUGH if slots.total <= _MANY_SLOTS else _ENOUGH_OF_MANY
        self._enough = math.ceil(part * slots.total)
        self._closed = False
        self.given_back_count = 0

    def settle(self, outcome: ClaimOutcome) -> None:
        """Settle one claim soon. Its outcome is kept until PostgreSQL has recorded it."""
        self._pending.append(outcome)
        self._arrived.set()
        if self._begun:
            self._begun.pop(job_of(outcome), None)
        if not self._begun or len(self._pending) >= self._enough:
            self._complete.set()

    def mark(self, queue: Queue, claims: Sequence[Claim]) -> asyncio.Future[list[MarkedJob]]:
        """Mark claims of one life of a shard, different jobs, in the next turn.

        The future has the jobs that may be sent (`storage.mark_sending`), or an error of
        PostgreSQL: then nothing may be sent.
        """
        request = _MarkRequest(queue, claims, asyncio.get_running_loop().create_future())
        self._marks.append(request)
        for claim in claims:
            self.expect_mark(claim)
        return request.marked

    def expect_mark(self, claim: Claim) -> None:
        """Begin a turn soon: in `hand_over`, it will be asked to mark this claim."""
        self._arrived.set()
        if claim.waited < _FRESH:
            self._fresh = True
            self._complete.set()

    def begin(self, jobs: Iterable[JobRef]) -> None:
        """Note which sends begin now: the outcomes of those that end soon are recorded together."""
        now = time.monotonic()
        self._begun |= dict.fromkeys(jobs, now)

    def follow(self, successor: HeadLoader) -> None:
        """Settle in this later key space too from now on, and pass on what it may have missed."""
        self._queue_settler.follow(successor)
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
                    tasks.create_task(self._queue_settler.settle_recent(loader))
                self._new_successors = []
                group, self._pending = self._pending, []
                await self._take_turn(group, tasks)
                if self._closed and not (self._pending or self._marks):
                    return
                raise_if_cancelled()

    async def _wait_for_more(self) -> None:
        """Wait a moment for the outcomes of the sends that began lately.

        Sends of one group often end within a millisecond. Recorded one by one, each would pay for
        its own statements, and so would the claims of the slots that they free. A claim that can be
        marked ends the wait: its mail may be due now.
        """
        since = time.monotonic() - _LATELY_S
        while self._begun and self._begun[job := next(iter(self._begun))] < since:
            del self._begun[job]
        if not self._begun or self._fresh or len(self._pending) >= self._enough or self._closed:
            return
        self._complete.clear()
        timer = asyncio.get_running_loop().call_later(_PATIENCE_S, self._complete.set)
        await self._complete.wait()
        timer.cancel()

    async def _take_turn(self, group: list[ClaimOutcome], tasks: asyncio.TaskGroup) -> None:
        """Record a group, and mark what was claimed."""
        plain = [outcome for outcome in group if _is_plain(outcome)]
        self._hand_over(len(plain))
        requests = self._next_marks()
        if requests and await self._settle_and_mark(plain, requests, tasks):
            group = [outcome for outcome in group if not _is_plain(outcome)]
        if group:
            await self._finish(group, tasks)
        self._slots.end_hand_over()

    def _next_marks(self) -> list[_MarkRequest]:
        """Take the marks of the next turn: of one life of a shard, each job once."""
        taken: list[_MarkRequest] = []
        left: list[_MarkRequest] = []
        jobs: set[int] = set()
        for request in self._marks:
            first = taken[0] if taken else request
            ids = {claim.job.job_id for claim in request.claims}
            together = request.queue is first.queue and request.life == first.life
            if together and jobs.isdisjoint(ids):
                taken.append(request)
                jobs |= ids
            else:
                left.append(request)
        self._marks = left
        self._fresh = False
        if left:
            self._arrived.set()
        return taken

    async def _settle_and_mark(
        self,
        plain: list[EndedAttempt],
        requests: Sequence[_MarkRequest],
        tasks: asyncio.TaskGroup,
    ) -> bool:
        """Record outcomes and mark claims by one statement. False: it did neither.

        An error of a mark fails the outcomes too. They are then recorded alone, at once, because
        that must happen before their leases end.
        """
        queue = requests[0].queue
        claims = [claim for request in requests for claim in request.claims]
        records = [outcome.record for outcome in plain]
        # Each end that is recorded makes room for one more claim. If the row of one is locked, its
        # mail stays in doubt, and another mail must not be in doubt besides.
        room = len(claims) - self._slots.excess
        marking = Marking(claims, self._lease, queue.shard, queue.key_space, self._seen(), room)
        moved: dict[int, int] = {}
        try:
            async with self._kept.connection() as kept:
                if records:
                    now, number = time.monotonic(), self._dispatcher()
                    moved, jobs = await storage.settle_and_mark(kept, records, now, marking, number)
                else:
                    jobs = await storage.mark_sending(kept, marking)
        except DATABASE_ERRORS as error:
            for request in requests:
                request.fail(error)
            self._slots.not_marked(len(claims))
            return False
        done = [outcome for outcome in plain if outcome.record.job.job_id in moved]
        if done:
            self._recorded(list(done), Recorded(dues_of(records, moved)), tasks)
        if missed := [outcome for outcome in plain if outcome.record.job.job_id not in moved]:
            # Locked, or not SENDING any more. The marks of others do not wait for them.
            tasks.create_task(self._finish(list(missed), tasks))
        # These begin now. Otherwise the mails that ended during the statement would not wait for
        # them, and two small groups would take turns for ever.
        self.begin(job.job for job in jobs)
        by_id = {job.job.job_id: job for job in jobs}
        for request in requests:
            found = [by_id[c.job.job_id] for c in request.claims if c.job.job_id in by_id]
            if not request.marked.done():
                request.marked.set_result(found)
        self._slots.not_marked(len(claims) - len(jobs))
        self._slots.settled(len(done))
        self._slots.end_hand_over()
        return True

    def _recorded(
        self, group: list[ClaimOutcome], recorded: Recorded, tasks: asyncio.TaskGroup
    ) -> None:
        # Not awaited: while Redis hangs, the next outcomes must still be recorded before their
        # leases expire. Before the release, so that the next claim finds what this frees.
        tasks.create_task(self._queue_settler.settle(group, recorded))

    async def _finish(
        self, group: list[ClaimOutcome], tasks: asyncio.TaskGroup, *, alone: bool = False
    ) -> None:
        """Record a group in PostgreSQL, then in Redis. `alone`: nothing else waits for it."""
        recorded = await self._until_recorded(group, alone=alone)
        if recorded is None:
            # The others, and later groups, must not wait for the outcome whose row is locked.
            for outcome in group:
                tasks.create_task(self._finish([outcome], tasks, alone=True))
            return
        self._recorded(group, recorded, tasks)
        returned = sum(isinstance(outcome, UnmarkedClaim) for outcome in group)
        self._slots.settled(len(group), returned)

    async def _record(self, group: list[ClaimOutcome]) -> Recorded:
        ended = [o for o in group if isinstance(o, EndedAttempt)]
        unsent = [o.marked for o in group if isinstance(o, UnsentJob)]
        recorded = await self._record_ended(ended) if ended else Recorded()
        dues = recorded.dues
        if unsent or any(is_stale(outcome, dues) for outcome in group):
            async with self._transactions.begin() as connection:
                moved = await storage.give_back(connection, unsent)
                given = {m.job: moved[m.job.job_id] for m in unsent if m.job.job_id in moved}
                # Only PostgreSQL knows when these jobs are due now. The marker makes some
                # dispatcher load them even if this process dies.
                stale = {sender_of(o) for o in group if is_stale(o, dues | given)}
                if stale:
                    await mark_stale(connection, sorted(stale))
            self.given_back_count += len(moved)
            dues |= given
        return recorded

    async def _record_ended(self, ended: list[EndedAttempt]) -> Recorded:
        records = [outcome.record for outcome in ended]
        if not any(may_matter(outcome.record, outcome.signal) for outcome in ended):
            async with self._kept.connection() as kept:
                moved = await self._settle(kept, records)
            return Recorded(dues_of(records, moved))
        async with self._transactions.begin() as connection:
            async with driver_within(connection) as driver:
                dues = dues_of(records, await self._settle(driver, records))
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
        return Recorded(dues, cooldowns)

    async def _settle(self, connection: Any, records: Sequence[AttemptRecord]) -> dict[int, int]:
        now = time.monotonic()
        return await storage.settle(connection, records, now, dispatcher=self._dispatcher())

    async def _until_recorded(self, group: list[ClaimOutcome], *, alone: bool) -> Recorded | None:
        """Record a group, however long it takes. None: a row is locked, and it is not `alone`."""
        failing = False
        while True:
            try:
                return await self._record(group)
            except DATABASE_ERRORS as error:
                if not alone and is_locked(error):
                    return None
                if not failing:
                    _log.warning("outcomes_wait", jobs=len(group), error=type(error).__name__)
                failing = True
                await asyncio.sleep(_RETRY_S)


def _is_plain(outcome: ClaimOutcome) -> TypeGuard[EndedAttempt]:
    """Return whether an outcome is recorded by a single statement."""
    return isinstance(outcome, EndedAttempt) and not may_matter(outcome.record, outcome.signal)
