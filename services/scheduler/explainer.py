"""Finds out why a job waits, from PostgreSQL and, if it can be reached, from Redis."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.scheduler.explaining import (
    MOST_AHEAD,
    BatchPause,
    Explanation,
    LastAttempt,
    OpenCircuit,
    Situation,
    UserSituation,
    explain,
    explain_state,
)
from outbox_server.services.scheduler.storage import email_jobs as storage
from outbox_server.services.scheduler.storage.batches import read_expire_after, read_pause
from outbox_server.services.scheduler.storage.email_jobs import JobRecord, PastAttempt
from outbox_server.services.scheduler.storage.holds import is_held
from outbox_server.shared.database.engine import from_unix_ms, snapshot
from outbox_server.shared.forecast.backlog import BacklogPosition, count_ahead
from outbox_server.shared.forecast.forecasts import forecast_job
from outbox_server.shared.forecast.microseconds import from_us
from outbox_server.shared.forecast.pace import Rules, SenderPace, read_pace
from outbox_server.shared.forecast.simulation import Limiter
from outbox_server.shared.forecast.user_shares import UserLimiter
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.limiter_state import LimiterState
from outbox_server.shared.queue.user_limits import UserSendLimits
from outbox_server.shared.states import JobState

_QUEUE_LIMIT_S: Final = 1.0
_NO_REDIS: Final = (
    " Redis cannot be reached, so nothing is sent at the moment; this answer is based on "
    "PostgreSQL alone."
)


@dataclass(frozen=True, slots=True)
class ExplainedJob:
    """A job, why it waits, and when it will be sent. `ahead` is None if it does not wait."""

    job: JobRecord
    explanation: Explanation
    ahead: int | None = None
    send_time: datetime | None = None


class Explainer:
    """Explains what jobs wait for."""

    def __init__(
        self, engine: AsyncEngine, loader: HeadLoader, rules: Rules, defer_for: timedelta
    ) -> None:
        """`defer_for` is OUTBOX_DEFER_FOR."""
        self._engine = engine
        self._loader = loader
        self._rules = rules
        self._defer_for = defer_for

    async def explain(self, job_id: int, user_id: str | None) -> ExplainedJob | None:
        """Explain a job. Return None if it does not exist or belongs to another user."""
        # One snapshot for the job, the attempts of its sender and the jobs before it.
        async with snapshot(self._engine) as connection:
            job = await storage.read_job(connection, job_id, user_id)
            if job is None:
                return None
            if job.state is not JobState.SCHEDULED:
                return ExplainedJob(job, explain_state(job.state))
            pace = await read_pace(connection, job.sender_id, self._rules)
            place = BacklogPosition(job.scheduled_at, job.job_id)
            paused = await read_pause(connection, job.batch_id)
            pause = None if paused is None else BatchPause(*paused)
            ahead = await count_ahead(
                connection, job.sender_id, place, MOST_AHEAD, paused=pause is not None
            )
            send_time = None
            held = await is_held(connection, job.job_id)
            if ahead < MOST_AHEAD and not held:
                expire_after = await read_expire_after(connection, job.batch_id)
                found = await forecast_job(
                    connection,
                    job.sender_id,
                    pace,
                    place=place,
                    ahead=ahead,
                    expire_after=expire_after,
                    batch_id=job.batch_id,
                )
                send_time = found.first
        live = await self._read_live(job)
        limiter = live.limiter or _limiter_from(pace)
        situation = _situation(job, pace, ahead, limiter, live.circuit)
        until = _deferred_until(job, self._defer_for)
        explanation = explain(replace(situation, deferred_until=until, held=held, batch=pause))
        if not live.reachable:
            explanation = Explanation(
                explanation.reason, explanation.until, explanation.text + _NO_REDIS
            )
        if send_time is not None and live.circuit and send_time < live.circuit.next_probe:
            # Nothing is sent before the probe, and its result is not known.
            send_time = None
        return ExplainedJob(job, explanation, ahead, send_time)

    async def _read_live(self, job: JobRecord) -> _LiveState:
        following = JobRef(job.job_id, job.attempts + 1)
        try:
            async with asyncio.timeout(_QUEUE_LIMIT_S):
                queue = (await self._loader.find_queues([job.sender_id]))[job.sender_id]
                limiter = await queue.read_limiter(job.sender_id, following)
                circuits = await queue.circuits_of_sender(job.sender_id)
        except (*QUEUE_ERRORS, TimeoutError):
            return _LiveState(reachable=False)
        # Both circuits may be open. Mail is sent only after the later probe.
        last = max(circuits, key=lambda circuit: circuit.next_probe_ms, default=None)
        if last is None:
            return _LiveState(limiter)
        circuit = OpenCircuit(
            since=from_unix_ms(last.open_since_ms),
            next_probe=from_unix_ms(last.next_probe_ms),
            reason=last.reason,
        )
        return _LiveState(limiter, circuit)


@dataclass(frozen=True, slots=True)
class _LiveState:
    """The state of a sender in Redis. `limiter` is None if Redis has no data of the sender."""

    limiter: LimiterState | None = None
    circuit: OpenCircuit | None = None
    reachable: bool = True


def _limiter_from(pace: SenderPace) -> LimiterState:
    """Calculate the state of the limiter from the attempts recorded in PostgreSQL."""
    found, user = _state_of(pace.limiter, pace.limiter.window, pace.now), pace.user
    if user is None:
        return found
    return replace(
        found,
        user=_state_of(user, pace.limiter.window, pace.now),
        user_limits=UserSendLimits(user.limit, timedelta(microseconds=user.gap)),
    )


def _state_of(limiter: Limiter | UserLimiter, window: int, now: int) -> LimiterState:
    gap_end = limiter.gap + (limiter.last_end or 0) if limiter.gap else 0
    window_end, room = 0, limiter.limit
    for sends in reversed(limiter.sent) if limiter.limit else ():
        if sends.count >= room:
            window_end = sends.first + (sends.count - room) * sends.step + window
            break
        room -= sends.count
    return LimiterState(
        in_flight=0,
        gap_left=timedelta(microseconds=gap_end - now),
        window_left=timedelta(microseconds=window_end - now),
    )


def _situation(
    job: JobRecord,
    pace: SenderPace,
    ahead: int,
    live: LimiterState,
    circuit: OpenCircuit | None,
) -> Situation:
    return Situation(
        now=from_us(pace.now),
        due=job.scheduled_at,
        attempts=job.attempts,
        failures=job.failures,
        sender_active=not pace.paused,
        sender_resumes=_resumes(pace),
        ahead=ahead,
        in_flight=live.in_flight,
        gap_left=live.gap_left,
        window_left=live.window_left,
        hourly_limit=pace.limiter.limit,
        claimed_for=live.claimed_for,
        parked=live.parked,
        user=_user_situation(live),
        opens=_opening(pace),
        circuit=circuit,
        cooldown=pace.cooldown,
        last=_last_attempt(job.last),
    )


def _user_situation(live: LimiterState) -> UserSituation | None:
    user, limits = live.user, live.user_limits
    if user is None:
        return None
    return UserSituation(
        limits.hourly_limit, bool(limits.gap), user.gap_left, user.window_left, user.in_flight
    )


def _last_attempt(attempt: PastAttempt | None) -> LastAttempt | None:
    if attempt is None:
        return None
    return LastAttempt(
        attempt.outcome,
        attempt.message,
        attempt.smtp_code,
        attempt.enhanced_code,
        attempt.reply_class,
    )


def _deferred_until(job: JobRecord, defer_for: timedelta) -> datetime | None:
    """Return until when a deferred job is tried; None if it is not deferred."""
    if job.deferred_since is None:
        return None
    until = job.deferred_since + defer_for
    return until if job.expires_at is None else min(until, job.expires_at)


def _resumes(pace: SenderPace) -> datetime | None:
    """Return when the pause of the sender ends by itself; None if it does not."""
    end = pace.limiter.not_before
    return from_us(end) if pace.active and end is not None else None


def _opening(pace: SenderPace) -> datetime | None:
    """Return when the sending hours begin again. None means that mail may be sent now."""
    opens = pace.limiter.hours.opens(pace.now) if pace.limiter.hours else None
    return None if opens is None or opens <= pace.now else from_us(opens)
