"""Records outcomes by groups: what ends while one group is being written is the next group.

First PostgreSQL, the truth; then Redis. If the process dies in between, the leases in Redis run
out, their slots count until then, and the sender's head is loaded again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from services.dispatcher import storage
from services.dispatcher.storage import AttemptRecord, MarkedJob
from shared.cancellation import raise_if_cancelled
from shared.database import DATABASE_ERRORS
from shared.heads import HeadLoader, mark_stale
from shared.queue.connection import QUEUE_ERRORS
from shared.queue.keys import JobRef
from shared.queue.queue import Claim, Settlement, SlotUse
from shared.states import JobState

_RETRY_S = 0.2
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt that was made."""

    record: AttemptRecord
    use: SlotUse
    # What it says of the endpoint, and which that is, as in `Settlement`.
    answered: bool = False
    connection_error: str | None = None
    server: str = ""


@dataclass(frozen=True, slots=True)
class Unsent:
    """A marked job whose body was not begun: it goes back. `held`: Redis still has its lease."""

    claim: Claim
    marked: MarkedJob
    held: bool = True


@dataclass(frozen=True, slots=True)
class Refused:
    """A claim that came to nothing: cancelled, sent by an earlier claim, or PostgreSQL failed.

    `waits`: as far as we know the job still waits, so Redis gets it back.
    """

    claim: Claim
    waits: bool = False


Outcome = Ended | Unsent | Refused


class Settler:
    """Takes outcomes and writes them; `on_recorded(n)` says that n jobs are off our hands."""

    def __init__(
        self,
        statements: AsyncEngine,
        transactions: AsyncEngine,
        loader: HeadLoader,
        on_recorded: Callable[[int], None],
    ) -> None:
        self._statements = statements
        self._transactions = transactions
        self._loader = loader
        self._on_recorded = on_recorded
        self._pending: list[Outcome] = []
        self._arrived = asyncio.Event()
        self._closed = False
        self.given_back_count = 0

    def add(self, outcome: Outcome) -> None:
        """Hand over one outcome; it is written soon, and kept until it is."""
        self._pending.append(outcome)
        self._arrived.set()

    def close(self) -> None:
        """End `run` once everything is written."""
        self._closed = True
        self._arrived.set()

    async def run(self) -> None:
        """Write until closed. Errors of either store are waited out, for nothing may be lost."""
        async with asyncio.TaskGroup() as releases:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                group, self._pending = self._pending, []
                if group:
                    dues = await self._until_recorded(group)
                    self._on_recorded(len(group))
                    # Not awaited: a Redis that hangs must not keep what ends meanwhile from being
                    # recorded before its lease runs out.
                    releases.create_task(self._release(group, dues))
                if self._closed and not self._pending:
                    return
                raise_if_cancelled()

    async def _record(self, group: list[Outcome]) -> dict[JobRef, int]:
        ended = [o.record for o in group if isinstance(o, Ended)]
        unsent = [o.marked for o in group if isinstance(o, Unsent)]
        dues: dict[JobRef, int] = {}
        if ended:
            async with self._statements.connect() as connection:
                moved = await storage.settle(connection, ended, time.monotonic())
            dues |= {r.job: moved[r.job.job_id] for r in ended if r.job.job_id in moved}
        if unsent or any(_is_stale(outcome, dues) for outcome in group):
            async with self._transactions.begin() as connection:
                moved = await storage.give_back(connection, unsent)
                given = {m.job: moved[m.job.job_id] for m in unsent if m.job.job_id in moved}
                # Where these wait now, only PostgreSQL knows; the marker outlives us.
                stale = {_sender_of(o) for o in group if _is_stale(o, dues | given)}
                if stale:
                    await mark_stale(connection, sorted(stale))
            self.given_back_count += len(moved)
            dues |= given
        return dues

    async def _release(self, group: list[Outcome], dues: dict[JobRef, int]) -> None:
        by_queue: dict[int, list[Settlement]] = {}
        stale: set[int] = set()
        now = time.monotonic()
        for outcome in group:
            settlement = _settlement(outcome, dues, now)
            shard = self._loader.queue_of(settlement.sender_id).shard
            by_queue.setdefault(shard, []).append(settlement)
            if _is_stale(outcome, dues):
                stale.add(settlement.sender_id)
        try:
            for settlements in by_queue.values():
                queue = self._loader.queue_of(settlements[0].sender_id)
                stale.update(await queue.settle(settlements))
            if stale:
                await self._loader.load(stale, committed=True)
        except (*QUEUE_ERRORS, *DATABASE_ERRORS) as error:
            # The leases run out by themselves, and a lost Redis is rebuilt from what was recorded.
            _log.warning("release_failed", jobs=len(group), error=type(error).__name__)

    async def _until_recorded(self, group: list[Outcome]) -> dict[JobRef, int]:
        failing = False
        while True:
            try:
                return await self._record(group)
            except DATABASE_ERRORS as error:
                if not failing:
                    _log.warning("outcomes_wait", jobs=len(group), error=type(error).__name__)
                failing = True
                await asyncio.sleep(_RETRY_S)


def _is_stale(outcome: Outcome, dues: dict[JobRef, int]) -> bool:
    """Whether only PostgreSQL knows where the job waits now.

    One that we did not move: its lease had run out, or an earlier try, whose answer was lost with
    the connection, has moved it.
    """
    if isinstance(outcome, Ended):
        return outcome.record.state is JobState.SCHEDULED and outcome.record.job not in dues
    return isinstance(outcome, Unsent) and (not outcome.held or outcome.marked.job not in dues)


def _sender_of(outcome: Outcome) -> int:
    if isinstance(outcome, Ended):
        return outcome.record.sender_id
    return outcome.claim.sender_id


def _settlement(outcome: Outcome, dues: dict[JobRef, int], now: float) -> Settlement:
    if not isinstance(outcome, Ended):
        claim = outcome.claim
        due: int | None
        if isinstance(outcome, Unsent):
            due = dues.get(claim.job) if outcome.held else None
        else:
            # Where it was in its head. If it waits no more, the next claim finds out.
            due = claim.due_ms if outcome.waits else None
        return Settlement(
            claim.sender_id,
            claim.job,
            SlotUse.UNUSED,
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
        age=timedelta(seconds=max(0.0, now - record.ended)),
        next_job=None if due is None else JobRef(record.job.job_id, record.job.attempt + 1),
        next_due_ms=due or 0,
        answered=outcome.answered,
        connection_error=outcome.connection_error,
        server=outcome.server,
    )
