"""Sends due mail in five steps.

1. claim (Redis): take jobs that may be sent now. Each gets a lease.
2. mark (PostgreSQL): move the jobs to SENDING and load them.
3. confirm (Redis): check that the leases still exist.
4. send (SMTP).
5. settle (PostgreSQL, then Redis): the Settler records the outcome, by the statement that marks
   the next jobs.

docs/send-path.md shows what happens if the process stops after each step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.claim_groups import ClaimGroup, ClaimGroups, TakenClaim
from outbox_server.services.dispatcher.composer import Composer
from outbox_server.services.dispatcher.cooling import CooldownRules
from outbox_server.services.dispatcher.ended_claims import UnmarkedClaim, UnsentJob
from outbox_server.services.dispatcher.endpoint_meter import EndpointMeter
from outbox_server.services.dispatcher.head_loads import HeadLoads
from outbox_server.services.dispatcher.metrics import DispatcherMetrics, LostLease
from outbox_server.services.dispatcher.progress import Progress
from outbox_server.services.dispatcher.renewer import Renewer
from outbox_server.services.dispatcher.restore_guard import RestoreGuard
from outbox_server.services.dispatcher.sending import ReadyMail, SendStep
from outbox_server.services.dispatcher.settler import Settler
from outbox_server.services.dispatcher.shares import Permit
from outbox_server.services.dispatcher.slots import Slots
from outbox_server.services.dispatcher.smtp import SmtpPool
from outbox_server.services.dispatcher.storage import MarkedJob, Unmarked
from outbox_server.services.dispatcher.wake import WakeListener
from outbox_server.shared.database.engine import DATABASE_ERRORS, is_locked
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.loops import raise_if_cancelled
from outbox_server.shared.queue.circuit_keys import user_key
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.queue.records import Claim, Claimed
from outbox_server.shared.quotas.storage import read_unproven_endpoints
from outbox_server.shared.settings import Settings
from outbox_server.shared.user_quotas import UserQuotas

if TYPE_CHECKING:
    from outbox_server.shared.traces.tracer import Tracer

# Redis cannot announce that it lost its data, so a shard is claimed from at least this often.
HEARTBEAT = timedelta(seconds=1)
_RETRY = timedelta(milliseconds=500)
# The pause before a job whose row was locked is claimed again.
_LOCKED_PAUSE = timedelta(seconds=1)
_MS = timedelta(milliseconds=1)
# The pause after a claim that took as many jobs ahead as may wait.
_AHEAD_PAUSE = 2 * _MS
# An operator's change of a quota applies after this time at the latest.
_QUOTAS_AGE = timedelta(seconds=5)
_log = structlog.get_logger(__name__)


class Dispatcher:
    """Sends due mail from all shards, at most `dispatcher_concurrency` mails at once."""

    def __init__(
        self,
        *,
        settings: Settings,
        statements: AsyncEngine,
        transactions: AsyncEngine,
        loader: HeadLoader,
        queues: Sequence[Queue],
        listeners: Sequence[WakeListener],
        composer: Composer,
        pool: SmtpPool,
        progress: Progress,
        metrics: DispatcherMetrics,
        guard: RestoreGuard,
        tracer: Tracer | None = None,
        confirmed_at: Callable[[], float] = time.monotonic,
        number: Callable[[], int | None] = lambda: None,
        meter: EndpointMeter | None = None,
    ) -> None:
        """`confirmed_at` and `number` are passed to `Settler`, the latter as `dispatcher`."""
        self._lease = settings.lease
        self._statements = statements
        self._loader = loader
        self._queues = queues
        self._listeners = listeners
        self._composer = composer
        self._pool = pool
        self._metrics = metrics
        self._guard = guard
        self._slots = Slots(
            settings.dispatcher_concurrency,
            unproven=UserQuotas.from_settings(settings).unproven_endpoints,
            on_room=self._wake,
        )
        self._settler = Settler(
            statements,
            transactions,
            loader,
            self._slots,
            CooldownRules.from_settings(settings),
            lease=settings.lease,
            seen=lambda: guard.seen,
            hand_over=lambda ended: self._groups.hand_over(ended),  # noqa: PLW0108 - assigned later
            metrics=metrics,
            confirmed_at=confirmed_at,
            dispatcher=number,
        )
        self._groups = ClaimGroups(
            self._slots,
            self._settler,
            settings.lease,
            metrics,
            lambda group, marks: self._spawn(self._process(group, marks)),
        )
        self._head_loads = HeadLoads(loader, self._spawn)
        self._renewer = Renewer(statements, loader, settings.lease, metrics)
        self._sending = SendStep(
            settings,
            composer=composer,
            pool=pool,
            renewer=self._renewer,
            slots=self._slots,
            progress=progress,
            metrics=metrics,
            meter=meter or EndpointMeter(),
            tracer=tracer,
            settle=self._settler.settle,
            spawn=self._spawn,
        )
        metrics.concurrency.set(settings.dispatcher_concurrency)
        metrics.in_flight.set_function(lambda: self.in_flight)
        self._group: asyncio.TaskGroup | None = None
        # The shards whose last claim failed.
        self._failing: set[int] = set()
        # Whether a store failed after a claim. The next claim then waits a little.
        self._store_failed = False

    @property
    def draining(self) -> bool:
        """Whether it takes no more jobs."""
        return self._slots.closed

    @property
    def in_flight(self) -> int:
        """The number of slots in use. After a crash, at most as many mails are in doubt."""
        return self._slots.in_flight

    @property
    def oldest_lease(self) -> timedelta | None:
        """How long ago the oldest send in flight was claimed; None if there is none."""
        return self._renewer.oldest

    def relay_keys(self) -> list[str]:
        """Return the relay's keys of the users whose mail went there last."""
        return self._slots.relay_keys()

    async def read_quotas(self) -> timedelta:
        """Read the quotas that operators have set. Return the time until the next read."""
        async with self._statements.connect() as connection:
            overrides = await read_unproven_endpoints(connection)
        self._slots.set_unproven({user_key(user): most for user, most in overrides.items()})
        return _QUOTAS_AGE

    def follow(self, successor: HeadLoader) -> None:
        """Tell the next key space too how the sends in flight go on and end."""
        self._settler.follow(successor)
        self._renewer.follow(successor)

    async def run(self, stop: asyncio.Event) -> None:
        """Dispatch until `stop` is set or `drain` is called.

        Mails whose body is being transmitted finish. All other jobs return to the queue. An
        unexpected error in any task ends the run, and the process starts again from what is
        recorded.
        """
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                stopping = group.create_task(self._drain_at(stop))
                settler = group.create_task(self._settler.run())
                renewer = group.create_task(self._renewer.run())
                loops = [
                    group.create_task(self._dispatch(queue, listener))
                    for queue, listener in zip(self._queues, self._listeners, strict=True)
                ]
                await asyncio.gather(*loops)
                await self._slots.wait_until_idle()
                self._settler.close()
                await settler
                stopping.cancel()
                renewer.cancel()
        finally:
            # Only an error leaves sends under way. The process starts again from what is recorded.
            await self._pool.stop()
            await self._pool.close()

    async def _drain_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        await self.drain()

    async def drain(self) -> int:
        """Take no more jobs and wait until none is in flight. Return how many were given back."""
        self._slots.close()
        self._pool.give_up_waiting()
        self._composer.give_up_building()
        self._wake()
        await self._slots.wait_until_idle()
        return self._settler.given_back_count

    def _wake(self) -> None:
        for listener in self._listeners:
            listener.wake()

    # The five steps --------------------------------------------------------------------------

    async def _dispatch(self, queue: Queue, listener: WakeListener) -> None:
        """Claim jobs of one shard as slots get free, until the dispatcher drains."""
        # Until when a claim can bring only jobs of users who were limited in the last one, unless
        # a message says that there are others (`time.monotonic`).
        until = 0.0
        while True:
            slots = await self._slots.take_free()
            if self._slots.closed:
                self._slots.release(slots)
                return
            raise_if_cancelled()
            ahead = self._slots.take_ahead()
            if queue.shard in self._failing:
                # Its server may hang. The other slots are for the shards of other servers.
                self._slots.return_ahead(ahead)
                if slots > 1:
                    self._slots.release(slots - 1)
                slots, ahead = min(slots, 1), 0
                if not slots:
                    # A claim for no jobs would not show whether the server answers.
                    listener.clear()
                    await listener.wait(_RETRY)
                    continue
            news = listener.heard
            listener.clear()
            left = until - time.monotonic()
            if left > 0 and not (news or ahead or self._slots.limited_has_room(queue.shard)):
                self._slots.release(slots)
                await listener.wait(timedelta(seconds=left))
                continue
            if self._loader.lives.is_superseded(queue):
                self._slots.return_ahead(ahead)
                self._slots.release(slots)
                await listener.wait(HEARTBEAT)
                continue
            claimed_at = time.monotonic()
            with self._slots.claiming(slots):
                claimed = await self._claim(queue, slots + ahead)
            # It is not awaited, so that jobs that become eligible meanwhile do not wait.
            self._head_loads.begin(queue, claimed)
            self._loader.learn_routes(queue, (claim.sender_id for claim in claimed.claims))
            self._metrics.claimed(claimed.claims)
            self._groups.start(queue, claimed.claims, claimed_at, slots)
            self._slots.return_ahead(ahead)
            pause = self._pause_after(claimed, slots + ahead)
            until = claimed_at + pause.total_seconds()
            if not (slots or pause):
                # The next jobs are claimed as a group once some of these have a slot.
                pause = _AHEAD_PAUSE
            if pause > timedelta(0):
                await listener.wait(pause)

    async def _process(self, group: ClaimGroup, marks: asyncio.Future[list[MarkedJob]]) -> None:
        """Confirm a group of claims once it is marked, and begin to send them."""
        mails: list[ReadyMail] = []
        try:
            mails = await self._confirm(group, await self._marked(group, marks))
        except (*QUEUE_ERRORS, *DATABASE_ERRORS) as error:
            _log.warning("start_failed", jobs=len(group.taken), error=type(error).__name__)
            # A lock concerns few jobs. It may also be on an outcome in the same statement.
            self._store_failed = self._store_failed or not is_locked(error)
        finally:
            for taken in group.taken.values():  # permits that no mail uses
                if taken.permit is not None:
                    self._slots.end(taken.permit, sent=False)
        await self._sending.begin(mails)

    async def _claim(self, queue: Queue, want: int) -> Claimed:
        """Claim up to `want` jobs, and note which users the claim limits."""
        limits = self._slots.limits(want)
        # Noted before the claim, because sends that end during the claim already make room.
        self._slots.limited(queue.shard, limits)
        try:
            claimed = await queue.claim(want, limits) if want else Claimed()
        except QUEUE_ERRORS as error:
            _log.warning("claim_failed", shard=queue.shard, error=type(error).__name__)
            claimed = Claimed(next_look=_RETRY)
            self._failing.add(queue.shard)
        else:
            self._failing.discard(queue.shard)
        if not claimed.parked and len(claimed.claims) < want:
            self._slots.limited(queue.shard, ())
        return claimed

    async def _marked(
        self, group: ClaimGroup, marks: asyncio.Future[list[MarkedJob]]
    ) -> list[tuple[TakenClaim, MarkedJob]]:
        """Wait until the jobs are SENDING. Jobs that may no longer be sent are left out."""
        missing, jobs = group.claims, []
        try:
            jobs = await marks
            by_ref = {job.job: job for job in jobs}
            missing = [claim for claim in missing if claim.job not in by_ref]
            if missing:
                async with self._statements.connect() as connection:
                    why = await storage.explain_unmarked(
                        connection, missing, shard=group.queue.shard
                    )
        except BaseException:
            # Nothing was sent. If the statement was committed, the lease of its attempts expires.
            for claim in missing:
                self._settler.settle(UnmarkedClaim(claim, waits=True))
            for job in jobs:
                self._settler.settle(UnsentJob(group.taken[job.job].claim, job))
            raise
        if missing:
            self._refused(group.queue, missing, why)
        return [(group.taken[ref], job) for ref, job in by_ref.items()]

    def _refused(self, queue: Queue, claims: Sequence[Claim], why: Unmarked) -> None:
        """Settle claims that PostgreSQL did not mark. Jobs that still wait return to the queue."""
        if not why.valid:
            # Another Redis server may be in use. The rebuild finds out; if none is, it rebuilds
            # here.
            self._head_loads.begin_rebuild(queue)
            self._store_failed = True
        claimed_ms = claims[0].lease_ms - self._lease // _MS
        if any(due_ms > why.postgres_ms for due_ms in why.due.values()):
            # Let Redis wait until the jobs are due by PostgreSQL's clock.
            queue.learn_clocks(claimed_ms, why.postgres_ms)
        if self._guard.hold is not None:
            # Otherwise each job of the heads, which were loaded before the hold, would be claimed.
            held = {claim.sender_id for claim in claims if claim.job.job_id not in why.due}
            if held:
                self._head_loads.begin_load(queue, sorted(held))
        for claim in claims:
            due_ms = why.due.get(claim.job.job_id)
            if due_ms is None:
                unknown = claim.job.job_id in why.unknown
                self._settler.settle(UnmarkedClaim(claim, unknown=unknown))
                continue
            if due_ms <= why.postgres_ms and why.valid:
                # Its row is locked. It is not claimed again at once, because the lock may last.
                due_ms = claimed_ms + _LOCKED_PAUSE // _MS
            self._settler.settle(UnmarkedClaim(replace(claim, due_ms=due_ms), waits=True))

    async def _confirm(
        self, group: ClaimGroup, marked: list[tuple[TakenClaim, MarkedJob]]
    ) -> list[ReadyMail]:
        """Return the jobs whose lease Redis still has and that get a permit.

        A lease may be gone because Redis lost its data after the claim. Batches are read before the
        leases are confirmed, so that the send begins right after that.
        """
        try:
            await self._composer.prepare([job for _, job in marked])
            claims = [taken.claim for taken, _ in marked]
            confirmed = await group.queue.confirm(claims) if claims else []
        except BaseException:
            for taken, job in marked:
                self._settler.settle(UnsentJob(taken.claim, job))
            raise
        mails: list[ReadyMail] = []
        for (taken, job), holds in zip(marked, confirmed, strict=True):
            claim = taken.claim
            if not holds:
                self._metrics.lost_leases(LostLease.BEFORE_SEND)
                self._settler.settle(UnsentJob(claim, job, leased=False))
                continue
            permit, taken.permit = taken.permit, None
            if permit := self._permit_for(job, permit):
                mails.append(ReadyMail(claim, taken.claimed_at, job, permit))
            else:
                # The sender's route is known now, so its next claim waits before the mark.
                self._settler.settle(UnsentJob(claim, job))
        return mails

    # Between the steps -----------------------------------------------------------------------

    def _permit_for(self, job: MarkedJob, permit: Permit | None) -> Permit | None:
        """Return a permit for a marked job: `permit`, if it is for the route of the job."""
        route = self._composer.route_of(job)
        if permit is not None:
            if permit.route == route:
                return permit
            self._slots.end(permit, sent=False)
        self._slots.learn(job.sender_id, route)
        return self._slots.permit(route, marked=True)

    def _pause_after(self, claimed: Claimed, want: int) -> timedelta:
        """Return how long to wait for a wake-up before the next claim."""
        if self._store_failed:
            self._store_failed = False
            return _RETRY
        if len(claimed.claims) == want:
            return timedelta(0)
        longest = _RETRY if claimed.lost or claimed.provisional else HEARTBEAT
        return longest if claimed.next_look is None else min(claimed.next_look, longest)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        if self._group is None:
            raise RuntimeError("the dispatcher is not running")
        try:
            self._group.create_task(coroutine)
        except RuntimeError:  # another task failed, and the whole run ends
            coroutine.close()
            raise
