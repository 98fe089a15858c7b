"""Renews the leases of sends in flight, so that leases can be short although replies are slow.

A round takes one UPDATE in PostgreSQL for all sends of the dispatcher, and one script in Redis per
shard. A dead dispatcher is noticed within one lease, and a slow reply is waited for.

PostgreSQL and Redis both store the lease: PostgreSQL so that no other dispatcher takes the job,
Redis so that the sender's entry and gap stay in use. A send goes on only while both are renewed;
otherwise it stops before the lease ends. The cases between the two:

- PostgreSQL was renewed and Redis was not: the send keeps the old end, which is the earlier one.
  The next round renews both. PostgreSQL is always renewed first, so the reverse cannot happen.
- The answer of one of them was lost: the lease may last longer than the dispatcher knows. The next
  round renews again, because neither store compares the old end. A send that stops before that
  does not know the end of its lease, so its job cannot be given back (`LeasedJob.known`). The end
  of the send is recorded as an attempt, for which the attempt number alone is the fencing token.
- Redis lost its data: the entry is gone until a load restores it from PostgreSQL. Meanwhile nobody
  can claim the job, because it is SENDING in PostgreSQL.
- The lease ended in PostgreSQL and no recovery has run yet: it is renewed like any other. If a
  recovery has run, the attempt has ended in PostgreSQL, and the send stops at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.metrics import DispatcherMetrics, LostLease
from outbox_server.services.dispatcher.smtp.lease import Lease
from outbox_server.services.dispatcher.storage import MarkedJob
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.loops import Loop
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.records import Claim

# The part of a lease that is reserved for recording the outcome, in case PostgreSQL is slow.
RESERVED_PART = 0.1
# A lease is renewed after a third of it, which leaves time for several tries.
_RENEWED_AFTER_PART = 1 / 3
# A try is cancelled after this part of a lease, so that the next try has time to succeed.
_TRY_LIMIT_PART = 1 / 4
_ROUNDS_PER_LEASE = 20
_LONGEST_PAUSE = timedelta(seconds=1)
# Cancelling a statement on a silent connection takes long. Further tries use other connections.
_MOST_TRIES_AT_ONCE = 3
_log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class LeasedJob:
    """A job that is being sent, with the leases in `claim` and `marked` as last renewed."""

    claim: Claim
    marked: MarkedJob
    lease: Lease
    # When the lease was last renewed, or claimed, as a value of `time.monotonic`.
    renewed: float
    # Whether `claim` and `marked` have the present ends of the lease. False from the start of a
    # renewal until both stores have answered: if an answer is lost, the lease may have moved.
    known: bool = True
    # When the job was claimed, as a value of `time.monotonic`.
    claimed: float = 0.0


class Renewer:
    """Renews the leases of all sends of a dispatcher, many of them per statement."""

    def __init__(
        self,
        statements: AsyncEngine,
        loader: HeadLoader,
        lease: timedelta,
        metrics: DispatcherMetrics | None = None,
    ) -> None:
        self._metrics = metrics or DispatcherMetrics()
        self._statements = statements
        self._loader = loader
        self._lease = lease
        self._lease_s = lease.total_seconds()
        self._try_limit_s = self._lease_s * _TRY_LIMIT_PART
        self._leased: dict[LeasedJob, None] = {}
        self._successors: list[HeadLoader] = []
        self._failing = False
        self._under_way: set[asyncio.Task[None]] = set()

    def begin(self, claim: Claim, marked: MarkedJob, claimed: float) -> LeasedJob:
        """Renew the lease of a job until `end`.

        `claimed` is the time of the claim, as a value of `time.monotonic`.
        """
        leased = LeasedJob(claim, marked, Lease(self._until(claimed)), claimed, claimed=claimed)
        self._leased[leased] = None
        return leased

    @property
    def oldest(self) -> timedelta | None:
        """How long ago the job of the oldest send in flight was claimed; None if there is none."""
        first = next(iter(self._leased), None)
        return None if first is None else timedelta(seconds=time.monotonic() - first.claimed)

    def end(self, leased: LeasedJob) -> None:
        """Stop renewing the lease. `leased` keeps what was known last."""
        self._leased.pop(leased, None)

    def follow(self, successor: HeadLoader) -> None:
        """Renew the leases in a later key space of Redis too (see `Settler`)."""
        self._successors.append(successor)

    def _until(self, renewed: float) -> float:
        """Return when a send must have stopped whose lease was last renewed at `renewed`."""
        return renewed + self._lease_s * (1 - RESERVED_PART)

    async def run(self) -> None:
        """Renew until cancelled."""
        async with asyncio.TaskGroup() as group:
            await Loop("renewing", partial(self._renew_old, group)).run()

    async def _renew_old(self, group: asyncio.TaskGroup) -> timedelta:
        old = self._old()
        self._under_way = {task for task in self._under_way if not task.done()}
        if old and len(self._under_way) < _MOST_TRIES_AT_ONCE:
            task = group.create_task(self._try_to_renew(old))
            self._under_way.add(task)
            await asyncio.wait({task}, timeout=self._try_limit_s)
        return min(_LONGEST_PAUSE, self._lease / _ROUNDS_PER_LEASE)

    def _old(self) -> list[LeasedJob]:
        """Return the jobs to renew now. A job whose lease has ended is left out: its send stops."""
        latest = time.monotonic() - self._lease_s * _RENEWED_AFTER_PART
        return [
            leased
            for leased in self._leased
            if leased.lease.begun and leased.lease.holds and leased.renewed <= latest
        ]

    async def _try_to_renew(self, old: Sequence[LeasedJob]) -> None:
        try:
            async with asyncio.timeout(self._try_limit_s):
                await self._renew(old)
        except (*DATABASE_ERRORS, *QUEUE_ERRORS, TimeoutError) as error:
            # The next round tries again. Each send stops by itself before its lease ends.
            if not self._failing:
                _log.warning("renewal_failed", jobs=len(old), error=type(error).__name__)
            self._failing = True
        else:
            self._failing = False

    async def _renew(self, old: Sequence[LeasedJob]) -> None:
        asked = time.monotonic()
        for leased in old:
            leased.known = False
        async with self._statements.connect() as connection:
            ends = await storage.renew_leases(
                connection, [leased.marked.job for leased in old], self._lease
            )
            missing = [each.marked.job for each in old if each.marked.job.job_id not in ends]
            locked = await storage.still_sending(connection, missing) if missing else set()
        ours: list[LeasedJob] = []
        for leased in old:
            end = ends.get(leased.marked.job.job_id)
            if leased not in self._leased:
                continue  # it has ended meanwhile
            if end is None and leased.marked.job.job_id in locked:
                continue  # the next round tries again, and the send stops before its lease ends
            if end is None:
                _log.warning("lease_lost", job_id=leased.marked.job.job_id)
                self._metrics.lost_leases(LostLease.RENEWAL)
                leased.lease.extend(asked)
            else:
                leased.marked = replace(leased.marked, lease_until=end)
                ours.append(leased)
        await self._renew_later(ours)
        by_shard: dict[int, list[LeasedJob]] = {}
        for leased in ours:
            by_shard.setdefault(self._loader.queue_of(leased.marked.sender_id).shard, []).append(
                leased
            )
        # All shards at once, so that one that cannot be reached stops no send of another shard.
        answers = await asyncio.gather(
            *(self._renew_in_redis(shard, jobs, asked) for shard, jobs in by_shard.items()),
            return_exceptions=True,
        )
        for error in answers:
            if error is not None:
                raise error

    async def _renew_later(self, jobs: Sequence[LeasedJob]) -> None:
        """Renew in later key spaces. A lease that is not there yet comes from PostgreSQL."""
        for loader in self._successors if jobs else ():
            queues = await loader.find_queues([leased.marked.sender_id for leased in jobs])
            for queue in set(queues.values()):
                await queue.renew(
                    [
                        (leased.marked.sender_id, leased.marked.job, leased.claim.user)
                        for leased in jobs
                        if queues[leased.marked.sender_id] is queue
                    ]
                )

    async def _renew_in_redis(self, shard: int, jobs: Sequence[LeasedJob], asked: float) -> None:
        """Renew the leases of one shard. A lease that Redis does not have is left as it was.

        The next load of the sender restores it, with the end that PostgreSQL stores. PostgreSQL was
        renewed first, so that end is never before the one that the send knows.
        """
        found = await self._loader.queues[shard].renew(
            [(leased.marked.sender_id, leased.marked.job, leased.claim.user) for leased in jobs]
        )
        missing = [
            leased.marked.sender_id
            for leased, end_ms in zip(jobs, found, strict=True)
            if end_ms is None
        ]
        if missing:
            # The sender may have been moved to another shard. The next round then asks that shard.
            await self._loader.find_queues(missing)
        for leased, end_ms in zip(jobs, found, strict=True):
            if end_ms is not None:
                leased.claim = replace(leased.claim, lease_ms=end_ms)
                leased.renewed = asked
                leased.known = True
                leased.lease.extend(self._until(asked))
