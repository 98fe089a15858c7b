"""The send path: claim (Redis), mark and load (PostgreSQL), confirm (Redis), SMTP, settle.

docs/send-path.md has it as a diagram, with what happens if everything stops after each step.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from services.dispatcher import storage
from services.dispatcher.composer import Composer, CompositionError
from services.dispatcher.progress import Progress
from services.dispatcher.retry import decide
from services.dispatcher.settler import Ended, Refused, Settler, Unsent
from services.dispatcher.shares import Place, Shares
from services.dispatcher.smtp import GivenBackError, SendResult, SmtpPool
from services.dispatcher.storage import AttemptRecord, MarkedJob
from services.dispatcher.wake import WakeListener
from shared.cancellation import raise_if_cancelled
from shared.database import DATABASE_ERRORS
from shared.heads import HeadLoader
from shared.queue.connection import QUEUE_ERRORS
from shared.queue.keys import JobRef
from shared.queue.queue import Claim, Queue, SlotUse
from shared.settings import Settings
from shared.states import CONNECTION_TROUBLE, AttemptOutcome

# A lost Redis tells nobody: whoever sleeps looks at least this often whether it is still whole.
HEARTBEAT = timedelta(seconds=1)
_RETRY = timedelta(milliseconds=500)
# The part of its lease that a send leaves to the record of its outcome, should PostgreSQL be away.
_RESERVED_PART = 0.1
_log = structlog.get_logger(__name__)


class Dispatcher:
    """Sends what may be sent, at most `concurrency` mails at once over all shards."""

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
    ) -> None:
        self._settings = settings
        self._statements = statements
        self._loader = loader
        self._queues = queues
        self._listeners = listeners
        self._composer = composer
        self._pool = pool
        self._progress = progress
        self._free = settings.dispatcher_concurrency
        self._shares = Shares(settings.dispatcher_concurrency)
        self._room = asyncio.Event()
        self._room.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = asyncio.Event()
        self._settler = Settler(statements, transactions, loader, self._recorded)
        self._group: asyncio.TaskGroup | None = None
        # Shards that we are rebuilding.
        self._rebuilding: set[int] = set()
        # A store failed us: the next look waits a little.
        self._troubled = False

    @property
    def draining(self) -> bool:
        """Whether it takes no more jobs."""
        return self._draining.is_set()

    @property
    def in_flight(self) -> int:
        """How many jobs are claimed and not yet recorded."""
        return self._settings.dispatcher_concurrency - self._free

    async def run(self, stop: asyncio.Event) -> None:
        """Dispatch until `stop` or `drain`: finish what is in its body, give back the rest.

        A fault of ours anywhere ends all of it: the process starts again, from what is recorded.
        """
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                stopping = group.create_task(self._drain_at(stop))
                settler = group.create_task(self._settler.run())
                loops = [
                    group.create_task(self._dispatch(queue, listener))
                    for queue, listener in zip(self._queues, self._listeners, strict=True)
                ]
                await asyncio.gather(*loops)
                await self._idle.wait()
                self._settler.close()
                await settler
                stopping.cancel()
        finally:
            self._pool.close()

    async def _drain_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        await self.drain()

    async def drain(self) -> int:
        """Take no more jobs; returns, when nothing is in flight, how many were given back."""
        self._draining.set()
        self._shares.give_up()
        self._room.set()
        for listener in self._listeners:
            listener.wake()
        await self._idle.wait()
        return self._settler.given_back_count

    # One loop a shard ------------------------------------------------------------------------

    async def _dispatch(self, queue: Queue, listener: WakeListener) -> None:
        while not self.draining:
            raise_if_cancelled()
            await self._room.wait()
            if self._draining.is_set():
                return
            if self._free <= 0:  # somebody else was faster
                self._room.clear()
                continue
            listener.clear()
            try:
                pause = await self._look(queue)
            except (*QUEUE_ERRORS, *DATABASE_ERRORS) as error:
                _log.warning("look_failed", shard=queue.shard, error=type(error).__name__)
                pause = _RETRY
            if self._troubled:
                self._troubled, pause = False, _RETRY
            if pause > timedelta(0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(listener.wait(), pause.total_seconds())

    async def _look(self, queue: Queue) -> timedelta:
        """Claim once and start what was claimed; returns how long to sleep."""
        want, self._free = self._free, 0
        self._room.clear()
        self._idle.clear()
        taken = 0
        try:
            asked = time.monotonic()
            claimed = await queue.claim(want)
            taken = len(claimed.claims)
        finally:
            self._return_room(want - taken)
        if claimed.lost and queue.shard not in self._rebuilding:
            self._rebuilding.add(queue.shard)
            # Not awaited: what is loaded by now may be sent.
            self._spawn(self._rebuild(queue))
        if claimed.loads:
            self._spawn(self._load(claimed.loads))
        if taken:
            deadline = asked + self._settings.lease.total_seconds()
            # Not awaited: what becomes eligible meanwhile must not wait for these to be marked.
            self._start_where_there_is_a_place(queue, claimed.claims, deadline)
        if taken == want:
            return timedelta(0)
        most = _RETRY if claimed.lost else HEARTBEAT
        return most if claimed.next_look is None else min(claimed.next_look, most)

    def _start_where_there_is_a_place(
        self, queue: Queue, claims: Sequence[Claim], deadline: float
    ) -> None:
        """Start what is not known to go by an endpoint that has its share; let that wait."""
        starting: list[Claim] = []
        places: dict[JobRef, Place] = {}
        for claim in claims:
            key = self._shares.endpoint_of(claim.sender_id)
            if key is None or self.draining:
                starting.append(claim)
            elif place := self._shares.take(key):
                starting.append(claim)
                places[claim.job] = place
            else:
                # Half the lease: the rest is for the send.
                half = deadline - time.monotonic() - self._settings.lease.total_seconds() / 2
                turn = self._shares.wait(key, asyncio.get_running_loop().time() + half)
                self._spawn(self._start_later(queue, claim, turn, deadline))
        if starting:
            self._spawn(self._start_or_return(queue, starting, deadline, places))
        self._return_room(len(claims) - len(starting))

    async def _start_later(
        self, queue: Queue, claim: Claim, turn: asyncio.Future[Place | None], deadline: float
    ) -> None:
        """Start a claim when it has a place; or give it back."""
        place = await turn
        if place is None:
            self._free -= 1  # which `hand_over` does where it gives a place
            self._settler.add(Refused(claim, waits=True))
        self._shares.stop_waiting()
        if place is not None:
            await self._start_or_return(queue, [claim], deadline, {claim.job: place})

    async def _rebuild(self, queue: Queue) -> None:
        try:
            await self._loader.rebuild(queue)
        except (*QUEUE_ERRORS, *DATABASE_ERRORS) as error:
            _log.warning("rebuild_failed", shard=queue.shard, error=type(error).__name__)
        finally:
            self._rebuilding.discard(queue.shard)

    async def _load(self, sender_ids: Sequence[int]) -> None:
        try:
            await self._loader.load(sender_ids, committed=False)
        except (*QUEUE_ERRORS, *DATABASE_ERRORS) as error:
            # It is asked for again, by whoever looks at the sender when it is overdue.
            _log.warning("load_failed", senders=len(sender_ids), error=type(error).__name__)

    async def _start_or_return(
        self,
        queue: Queue,
        claims: Sequence[Claim],
        deadline: float,
        places: dict[JobRef, Place],
    ) -> None:
        """Start claims; `places`: those that they have, for none or some of them."""
        try:
            await self._start(queue, claims, deadline, places)
        except (*QUEUE_ERRORS, *DATABASE_ERRORS) as error:
            _log.warning("start_failed", jobs=len(claims), error=type(error).__name__)
            self._troubled = True
        finally:
            for place in places.values():  # of what was not begun
                self._shares.leave(place, sent=False)

    async def _start(
        self,
        queue: Queue,
        claims: Sequence[Claim],
        deadline: float,
        places: dict[JobRef, Place],
    ) -> None:
        """Mark, load and confirm a group of claims, and begin to send each, with its place."""
        marked: list[MarkedJob] = []
        try:
            async with self._statements.connect() as connection:
                marked = await storage.mark_sending(
                    connection, [claim.job for claim in claims], self._settings.lease
                )
        except BaseException:
            # Nothing was sent. If it was committed all the same, that attempt's lease runs out.
            for claim in claims:
                self._settler.add(Refused(claim, waits=True))
            raise
        by_job = {job.job: job for job in marked}
        for claim in claims:
            if claim.job not in by_job:
                self._settler.add(Refused(claim))
        ours = [claim for claim in claims if claim.job in by_job]
        try:
            await self._composer.prepare(marked)
            held = await queue.confirm(ours) if ours else []
        except BaseException:
            for claim in ours:
                self._settler.add(Unsent(claim, by_job[claim.job]))
            raise
        for claim, holds in zip(ours, held, strict=True):
            job = by_job[claim.job]
            if not holds:
                self._settler.add(Unsent(claim, job, held=False))
            elif place := self._place_of(job, places):
                self._spawn(self._send(claim, job, deadline, place))
            else:
                # Its sender is known from now on: the next claim of it waits before it is marked.
                self._settler.add(Unsent(claim, job))

    def _place_of(self, job: MarkedJob, places: dict[JobRef, Place]) -> Place | None:
        """Return the place for a job: the one that it has, if its endpoint is the one we knew."""
        endpoint = self._composer.endpoint_of(job)
        key = (endpoint.host, endpoint.port) if endpoint else ("", 0)
        place = places.pop(job.job, None)
        if place is None or place.key != key:
            if place is not None:
                self._shares.leave(place, sent=False)
            self._shares.learn(job.sender_id, key)
            place = self._shares.take(key)
        return place

    # One task a mail -------------------------------------------------------------------------

    async def _send(self, claim: Claim, job: MarkedJob, deadline: float, place: Place) -> None:
        started = time.monotonic()
        result: SendResult | None = None
        try:
            endpoint, envelope = self._composer.compose(job)
            result = await self._pool.send(
                endpoint,
                envelope,
                deadline=deadline - self._settings.lease.total_seconds() * _RESERVED_PART,
                may_begin=lambda: not self.draining,
            )
        except GivenBackError:
            self._settler.add(Unsent(claim, job))
            return
        except CompositionError as error:
            result = _not_built(error, started)
        except Exception:  # noqa: BLE001 - see below
            # A fault of ours must not hold the job for ever, nor pass for a fault of the mail.
            _log.exception("send_failed", job=job.job.job_id)
            result = SendResult(
                AttemptOutcome.TEMPORARY_FAILURE,
                body_begun=False,
                started=started,
                ended=time.monotonic(),
                message="internal error of the dispatcher",
            )
        finally:
            self._shares.leave(place, sent=result is not None)
        if result.outcome is AttemptOutcome.CONNECTION_FAILURE:
            # Redis knows whether the others may try: its circuit may be open by now.
            self._shares.give_up(place.key)
        asked = deadline - self._settings.lease.total_seconds()
        late = claim.waited + timedelta(seconds=result.started - asked)
        host, port = place.key
        self._settle(job, result, late, f"{host}:{port}")

    def _settle(self, job: MarkedJob, result: SendResult, late: timedelta, server: str) -> None:
        verdict = decide(
            result.outcome,
            job.failures,
            backoff=self._settings.retry_backoff,
            policy=self._settings.uncertain_policy,
            chance=random.random(),  # noqa: S311 - jitter
        )
        self._progress.count(sent=result.outcome is AttemptOutcome.SENT)
        record = AttemptRecord(
            job=job.job,
            sender_id=job.sender_id,
            state=verdict.state,
            failures=verdict.failures,
            outcome=result.outcome,
            counted=result.body_begun,
            started=result.started,
            ended=result.ended,
            retry_after=verdict.retry_after,
            late=late,
            smtp_code=result.smtp_code,
            enhanced_code=result.enhanced_code,
            message=result.message,
        )
        broken = result.outcome in CONNECTION_TROUBLE
        self._settler.add(
            Ended(
                record,
                SlotUse.COUNTED if result.body_begun else SlotUse.BEGUN,
                # Without a code the server had no part in it.
                answered=not broken and result.smtp_code is not None,
                connection_error=(result.message or result.outcome.name) if broken else None,
                server=server,
            )
        )

    # Room ------------------------------------------------------------------------------------

    def _recorded(self, count: int) -> None:
        self._return_room(count)

    def _return_room(self, count: int) -> None:
        self._free += count
        while self._free > 0 and self._shares.hand_over():
            self._free -= 1
        if self._free > 0:
            self._room.set()
        if self.in_flight == 0 and not self._shares.waiting:
            self._idle.set()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        if self._group is None:
            raise RuntimeError("the dispatcher does not run")
        try:
            self._group.create_task(coroutine)
        except RuntimeError:  # a fault elsewhere ends all of it
            coroutine.close()
            raise


def _not_built(error: CompositionError, started: float) -> SendResult:
    return SendResult(
        AttemptOutcome.PERMANENT_FAILURE,
        body_begun=False,
        started=started,
        ended=time.monotonic(),
        message=str(error)[:500].replace("\x00", ""),
    )
