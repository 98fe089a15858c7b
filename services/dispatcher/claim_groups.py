"""Gives claims their slots and permits, and forms the groups that go through the steps together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from outbox_server.services.dispatcher.ended_claims import UnmarkedClaim
from outbox_server.services.dispatcher.metrics import DispatcherMetrics, WaitCause
from outbox_server.services.dispatcher.settler import Settler
from outbox_server.services.dispatcher.shares import Permit, Route
from outbox_server.services.dispatcher.slots import Resume, Slots
from outbox_server.services.dispatcher.storage import MarkedJob
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.queue.records import Claim


@dataclass(eq=False, slots=True)
class TakenClaim:
    """A claim that has a slot and a permit.

    `claimed_at` is the `time.monotonic` from which its lease counts. The permit is None once its
    mail has it, or it was given back.
    """

    claim: Claim
    claimed_at: float
    permit: Permit | None


@dataclass(eq=False, slots=True)
class ClaimGroup:
    """Claims of different jobs, made in one life of a shard, that go through the steps together."""

    queue: Queue
    taken: dict[JobRef, TakenClaim]

    @property
    def claims(self) -> list[Claim]:
        """The claims of the group."""
        return [taken.claim for taken in self.taken.values()]


class ClaimGroups:
    """Starts the claims that may go on. All others wait in `Slots`.

    `process` begins to work on a group, with the future that `Settler.mark` returned for it.
    """

    def __init__(
        self,
        slots: Slots,
        settler: Settler,
        lease: timedelta,
        metrics: DispatcherMetrics,
        process: Callable[[ClaimGroup, asyncio.Future[list[MarkedJob]]], None],
    ) -> None:
        self._slots = slots
        self._settler = settler
        self._lease_s = lease.total_seconds()
        self._metrics = metrics
        self._process = process
        # The claims that have a slot and a permit, by queue and by the life in which they were
        # made.
        self._ready: dict[tuple[Queue, str], list[TakenClaim]] = {}

    def start(self, queue: Queue, claims: Sequence[Claim], claimed_at: float, slots: int) -> None:
        """Begin to process the claims of a shard, and release the slots that are left.

        Claims without a permit or a slot wait for both. A claim whose route is not known is marked
        all the same, because the mark tells the route.
        """
        waiting: list[tuple[Route, Resume]] = []
        for claim in self._slots.in_turn(claims):
            route = self._slots.route_of(claim.sender_id) or Route("", claim.user)
            permit = self._slots.permit(route) if slots else None
            if permit is None:
                waiting.append((route, partial(self._resume, queue, claim, claimed_at)))
                continue
            slots -= 1
            self._take(queue, TakenClaim(claim, claimed_at, permit))
        if waiting:
            # Half of the lease is left for the send.
            half = claimed_at + self._lease_s / 2
            slow = self._slots.wait(waiting, half - time.monotonic(), slots=0)
            self._metrics.waited(WaitCause.DISPATCHER, slow)
        self._slots.release(slots)

    def hand_over(self, number: int) -> None:
        """Let claims that wait take over the slots of sends, and ask for the marks of all claims.

        Called by the settler at the beginning of a turn.
        """
        if number:
            self._slots.hand_over(number)
        self._mark()

    def _resume(self, queue: Queue, claim: Claim, claimed_at: float, permit: Permit | None) -> None:
        """Process a claim that has waited, or give it back if it got no permit."""
        if permit is None:
            self._settler.settle(UnmarkedClaim(claim, waits=True))
        else:
            self._take(queue, TakenClaim(claim, claimed_at, permit))

    def _take(self, queue: Queue, taken: TakenClaim) -> None:
        """Let a claim be marked in the next turn."""
        self._ready.setdefault((queue, taken.claim.life), []).append(taken)
        self._settler.expect_mark(taken.claim)

    def _mark(self) -> None:
        ready, self._ready = self._ready, {}
        for (queue, _), claims in ready.items():
            left = claims
            while left:
                taken: dict[JobRef, TakenClaim] = {}
                # A job may be claimed twice, as after a loss of Redis. Then it is marked twice, and
                # PostgreSQL refuses one of the marks.
                left = [each for each in left if taken.setdefault(each.claim.job, each) != each]
                group = ClaimGroup(queue, taken)
                self._process(group, self._settler.mark(queue, group.claims))
