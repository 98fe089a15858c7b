"""The send path: claim (Redis), mark and load (PostgreSQL), confirm (Redis), SMTP, settle.

docs/send-path.md has it as a diagram, with what happens if everything stops after each step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from services.dispatcher import storage
from services.dispatcher.composer import Composer, CompositionError
from services.dispatcher.cooling import CooldownRules
from services.dispatcher.judge import Judge
from services.dispatcher.progress import Progress
from services.dispatcher.renewer import Renewer
from services.dispatcher.settler import Refused, Settler, Unsent
from services.dispatcher.shares import Place, Route, Shares
from services.dispatcher.smtp import GivenBackError, SendResult, SmtpPool
from services.dispatcher.storage import MarkedJob
from services.dispatcher.wake import WakeListener
from shared.cancellation import raise_if_cancelled
from shared.database import DATABASE_ERRORS
from shared.heads import HeadLoader
from shared.queue.connection import QUEUE_ERRORS
from shared.queue.keys import JobRef
from shared.queue.queue import Claim, Queue
from shared.settings import Settings
from shared.states import AttemptOutcome

# A lost Redis tells nobody: whoever sleeps looks at least this often whether it is still whole.
HEARTBEAT = timedelta(seconds=1)
_RETRY = timedelta(milliseconds=500)
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
        self._settler = Settler(
            statements,
            transactions,
            loader,
            self._recorded,
            CooldownRules.from_settings(settings),
        )
        self._renewer = Renewer(statements, loader, settings.lease)
        self._judge = Judge(settings)
        self._group: asyncio.TaskGroup | None = None
        # Claims that are only held until they are given back, each with the timer for that.
        self._aside: dict[JobRef, tuple[Claim, asyncio.TimerHandle]] = {}
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
                renewer = group.create_task(self._renewer.run())
                loops = [
                    group.create_task(self._dispatch(queue, listener))
                    for queue, listener in zip(self._queues, self._listeners, strict=True)
                ]
                await asyncio.gather(*loops)
                await self._idle.wait()
                self._settler.close()
                await settler
                stopping.cancel()
                renewer.cancel()
        finally:
            await self._pool.close()

    async def _drain_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        await self.drain()

    async def drain(self) -> int:
        """Take no more jobs; returns, when nothing is in flight, how many were given back."""
        self._draining.set()
        self._shares.give_up()
        for job in list(self._aside):
            self._give_back(job)
        self._pool.give_up_waiting()
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
            route = self._shares.route_of(claim.sender_id)
            if route is None or self.draining:
                starting.append(claim)
            elif place := self._shares.take(route):
                starting.append(claim)
                places[claim.job] = place
            else:
                # Half the lease: the rest is for the send.
                half = deadline - time.monotonic() - self._settings.lease.total_seconds() / 2
                until = asyncio.get_running_loop().time() + half
                if self._shares.full:
                    self._set_aside(claim, until)
                else:
                    turn = self._shares.wait(route, until)
                    self._spawn(self._start_later(queue, claim, turn, deadline))
        if starting:
            self._spawn(self._start_or_return(queue, starting, deadline, places))
        self._return_room(len(claims) - len(starting))

    def _set_aside(self, claim: Claim, until: float) -> None:
        """Give a claim back at `until` (loop time): more wait for a place than may.

        Not at once, for then it would be claimed again at once.
        """
        loop = asyncio.get_running_loop()
        self._aside[claim.job] = claim, loop.call_at(until, self._give_back, claim.job)

    def _give_back(self, job: JobRef) -> None:
        claim, timer = self._aside.pop(job)
        timer.cancel()
        self._free -= 1  # until that is recorded
        self._settler.add(Refused(claim, waits=True))

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
            route = Route(key, self._composer.user_of(job))
            self._shares.learn(job.sender_id, route)
            place = self._shares.take(route)
        return place

    # One task a mail -------------------------------------------------------------------------

    async def _send(self, claim: Claim, job: MarkedJob, deadline: float, place: Place) -> None:
        started = time.monotonic()
        result: SendResult | None = None
        claimed = deadline - self._settings.lease.total_seconds()
        try:
            endpoint, envelope = self._composer.compose(job)
            with self._renewer.hold(claim, job, claimed) as held:
                try:
                    result = await self._pool.send(
                        endpoint,
                        envelope,
                        lease=held.lease,
                        may_begin=lambda: not self.draining,
                    )
                except GivenBackError:
                    self._settler.add(self._judge.given_back(held, started))
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
        late = claim.waited + timedelta(seconds=result.started - claimed)
        host, port = place.key
        self._progress.count(sent=result.outcome is AttemptOutcome.SENT)
        self._settler.add(self._judge.ended(claim, job, result, late=late, server=f"{host}:{port}"))

    # Room ------------------------------------------------------------------------------------

    def _recorded(self, count: int) -> None:
        self._return_room(count)

    def _return_room(self, count: int) -> None:
        self._free += count
        while self._free > 0 and self._shares.hand_over():
            self._free -= 1
        if self._free > 0:
            self._room.set()
        if self.in_flight == 0 and not self._shares.waiting and not self._aside:
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
