"""Records outcomes by groups: what ends while one group is being written is the next group.

First PostgreSQL, the truth; then Redis. If the process dies in between, the leases in Redis run
out, their slots count until then, and the sender's head is loaded again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from services.dispatcher import storage
from services.dispatcher.cooling import CooldownRules, Signal, may_matter, record_cooldowns
from services.dispatcher.storage import AttemptRecord, MarkedJob
from shared.cancellation import raise_if_cancelled
from shared.database import DATABASE_ERRORS
from shared.head_markers import mark_stale
from shared.heads import HeadLoader
from shared.queue.connection import QUEUE_ERRORS
from shared.queue.keys import JobRef
from shared.queue.queue import Claim, Contact, Settlement, SlotUse
from shared.states import JobState

_RETRY_S = 0.2
_log = structlog.get_logger(__name__)


_NOTHING = Signal()


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt that was made."""

    record: AttemptRecord
    use: SlotUse
    # What it says about the endpoint, and which endpoint that is, as in `Settlement`.
    contact: Contact = Contact.NONE
    connection_error: str = ""
    server: str = ""
    # What it says about the sender's account.
    signal: Signal = _NOTHING


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


@dataclass(frozen=True, slots=True)
class _Recorded:
    """The result of recording a group of outcomes in PostgreSQL.

    `dues` has the due time (Unix ms) of each job that changed its state. `cooldowns` is the result
    of `record_cooldowns`.
    """

    dues: dict[JobRef, int] = field(default_factory=dict)
    cooldowns: dict[JobRef, timedelta] = field(default_factory=dict)


class Settler:
    """Takes outcomes and writes them; `on_recorded(n)` says that n jobs are off our hands."""

    def __init__(
        self,
        statements: AsyncEngine,
        transactions: AsyncEngine,
        loader: HeadLoader,
        on_recorded: Callable[[int], None],
        rules: CooldownRules,
    ) -> None:
        self._rules = rules
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
                    recorded = await self._until_recorded(group)
                    self._on_recorded(len(group))
                    # Not awaited: a Redis that hangs must not keep what ends meanwhile from being
                    # recorded before its lease runs out.
                    releases.create_task(self._release(group, recorded))
                if self._closed and not self._pending:
                    return
                raise_if_cancelled()

    async def _record(self, group: list[Outcome]) -> _Recorded:
        ended = [o for o in group if isinstance(o, Ended)]
        unsent = [o.marked for o in group if isinstance(o, Unsent)]
        recorded = await self._record_ended(ended) if ended else _Recorded()
        dues = recorded.dues
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
        return recorded

    async def _record_ended(self, ended: list[Ended]) -> _Recorded:
        records = [outcome.record for outcome in ended]
        if not any(may_matter(outcome.record, outcome.signal) for outcome in ended):
            async with self._statements.connect() as connection:
                return _Recorded(_dues(records, await _settle(connection, records)))
        async with self._transactions.begin() as connection:
            dues = _dues(records, await _settle(connection, records))
            cooldowns = await record_cooldowns(
                connection,
                [(o.record, o.signal) for o in ended if o.record.job in dues],
                self._rules,
                time.monotonic(),
            )
            if cooldowns:
                # If this process dies before it tells Redis, a load of the sender will.
                await mark_stale(
                    connection, sorted({r.sender_id for r in records if r.job in cooldowns})
                )
        return _Recorded(dues, cooldowns)

    async def _release(self, group: list[Outcome], recorded: _Recorded) -> None:
        by_queue: dict[int, list[Settlement]] = {}
        stale: set[int] = set()
        now = time.monotonic()
        for outcome in group:
            settlement = _settlement(outcome, recorded, now)
            shard = self._loader.queue_of(settlement.sender_id).shard
            by_queue.setdefault(shard, []).append(settlement)
            if _is_stale(outcome, recorded.dues) or _may_have_cooled(outcome, settlement):
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

    async def _until_recorded(self, group: list[Outcome]) -> _Recorded:
        failing = False
        while True:
            try:
                return await self._record(group)
            except DATABASE_ERRORS as error:
                if not failing:
                    _log.warning("outcomes_wait", jobs=len(group), error=type(error).__name__)
                failing = True
                await asyncio.sleep(_RETRY_S)


async def _settle(connection: AsyncConnection, records: Sequence[AttemptRecord]) -> dict[int, int]:
    return await storage.settle(connection, records, time.monotonic())


def _dues(records: Sequence[AttemptRecord], moved: Mapping[int, int]) -> dict[JobRef, int]:
    return {r.job: moved[r.job.job_id] for r in records if r.job.job_id in moved}


def _is_stale(outcome: Outcome, dues: dict[JobRef, int]) -> bool:
    """Whether only PostgreSQL knows where the job waits now.

    One that we did not move: its lease had run out, or an earlier try, whose answer was lost with
    the connection, has moved it.
    """
    if isinstance(outcome, Ended):
        return outcome.record.state is JobState.SCHEDULED and outcome.record.job not in dues
    return isinstance(outcome, Unsent) and (not outcome.held or outcome.marked.job not in dues)


def _may_have_cooled(outcome: Outcome, settlement: Settlement) -> bool:
    """Return whether the sender's cooldown changed, or may have changed.

    It may have if the answer to an earlier try was lost.
    """
    if settlement.cooldown is not None:
        return True
    return isinstance(outcome, Ended) and may_matter(outcome.record, outcome.signal)


def _sender_of(outcome: Outcome) -> int:
    if isinstance(outcome, Ended):
        return outcome.record.sender_id
    return outcome.claim.sender_id


def _settlement(outcome: Outcome, recorded: _Recorded, now: float) -> Settlement:
    dues = recorded.dues
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
        contact=outcome.contact,
        connection_error=outcome.connection_error,
        server=outcome.server,
        cooldown=recorded.cooldowns.get(record.job),
    )
