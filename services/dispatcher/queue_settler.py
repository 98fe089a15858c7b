"""Settles claims in Redis, once PostgreSQL has recorded how they ended.

If the process dies between the two stores, the leases in Redis expire. Until then they count in the
window, and afterwards the sender's head is loaded again.

When the settings of the installation change, other processes load the next key space of Redis from
PostgreSQL. There too, a send that is in flight meanwhile has a lease, which ends with the send.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import structlog

from outbox_server.services.dispatcher.ended_claims import (
    ClaimOutcome,
    EndedAttempt,
    Recorded,
    UnmarkedClaim,
    UnsentJob,
    is_stale,
    may_have_cooled,
    settlement_of,
)
from outbox_server.shared.database.engine import DATABASE_ERRORS
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.queue.records import Settlement

_log = structlog.get_logger(__name__)


class QueueSettler:
    """Settles claims in the current key space of Redis, and in later ones."""

    def __init__(self, loader: HeadLoader, confirmed_at: Callable[[], float]) -> None:
        """`confirmed_at` returns since when no change of the settings can be unknown here."""
        self._loader = loader
        self._confirmed_at = confirmed_at
        # The loaders of later key spaces.
        self._successors: list[HeadLoader] = []
        # What was recorded since `confirmed_at`: a load of the next key space may have missed it.
        self._recent: deque[tuple[float, list[ClaimOutcome], Recorded]] = deque()

    def follow(self, successor: HeadLoader) -> None:
        """Settle in this later key space too from now on."""
        self._successors.append(successor)

    async def settle(self, group: list[ClaimOutcome], recorded: Recorded) -> None:
        """Settle what PostgreSQL has recorded, in all key spaces."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < self._confirmed_at():
            self._recent.popleft()
        self._recent.append((now, group, recorded))
        await self._settle_in(self._loader, group, recorded)
        for loader in self._successors:
            await self._settle_later(loader, group, recorded)

    async def settle_recent(self, loader: HeadLoader) -> None:
        """Settle in a later key space what its load may have missed."""
        for _, group, recorded in list(self._recent):
            await self._settle_later(loader, group, recorded)

    async def _settle_later(
        self, loader: HeadLoader, group: list[ClaimOutcome], recorded: Recorded
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
            _release_failed(len(unsent), error)
        if ended:
            await self._settle_in(loader, ended, recorded)

    async def _settle_in(
        self, loader: HeadLoader, group: Sequence[ClaimOutcome], recorded: Recorded
    ) -> None:
        by_queue: dict[int, list[Settlement]] = {}
        stale: set[int] = set()
        now = time.monotonic()
        for outcome in group:
            settlement = settlement_of(outcome, recorded, now)
            shard = loader.queue_of(settlement.sender_id).shard
            by_queue.setdefault(shard, []).append(settlement)
            unknown = isinstance(outcome, UnmarkedClaim) and outcome.unknown
            # Without a marker, even for a sender that does not exist: if this process dies, the
            # lease expires, which causes a load.
            if unknown or is_stale(outcome, recorded.dues) or may_have_cooled(outcome, settlement):
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
