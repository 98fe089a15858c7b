"""Begins and ends cooldowns, in the transaction that records the attempts.

The settle that follows tells Redis. After a loss of Redis, the load of the head restores the
cooldown. Only an attempt that began after the time of the last probe makes the next wait longer:
mail that was in flight at the first refusal says nothing new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.services.dispatcher import storage
from outbox_server.services.dispatcher.storage import AccountRefusal, AttemptRecord
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import JobState, ReplyClass

_OVER = timedelta(0)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CooldownRules:
    """The settings OUTBOX_COOLDOWN, OUTBOX_QUOTA_DAY and OUTBOX_REFUSALS_IN_A_ROW."""

    backoff: tuple[timedelta, ...]
    day: timedelta
    refusals_in_a_row: int

    @classmethod
    def from_settings(cls, settings: Settings) -> CooldownRules:
        """Read the three settings."""
        return cls(settings.cooldown, settings.quota_day, settings.refusals_in_a_row)


@dataclass(frozen=True, slots=True)
class Signal:
    """What an attempt says about its sender's account.

    `refused` means that the account was refused, and `daily` that a daily quota was the reason.
    `probe` means that the sender was cooling down and this attempt was its probe.
    """

    refused: bool = False
    daily: bool = False
    probe: bool = False


def may_matter(record: AttemptRecord, signal: Signal) -> bool:
    """Return whether an attempt can begin, prolong or end a cooldown."""
    ends = signal.probe and record.state is JobState.SENT
    return signal.refused or ends or record.reply_class is ReplyClass.REFUSED


async def record_cooldowns(
    connection: AsyncConnection,
    attempts: Sequence[tuple[AttemptRecord, Signal]],
    rules: CooldownRules,
    now: float,
) -> dict[JobRef, timedelta]:
    """Begin, prolong or end cooldowns after attempts that were just recorded.

    `now` is a value of `time.monotonic`. Returns, by attempt, how long its sender must wait for the
    next probe; zero means that the cooldown is over. Attempts that change nothing are left out.
    """
    waits: dict[JobRef, timedelta] = {}
    cooling: set[int] = set()
    # In a fixed order, so that two dispatchers cannot deadlock.
    for record, signal in sorted(attempts, key=lambda each: (each[0].sender_id, each[0].ended)):
        if signal.probe and record.state is JobState.SENT:
            if await storage.end_cooldowns(connection, [record.sender_id]):
                _log.warning(
                    "cooldown_ended",
                    sender=record.sender_id,
                    by="an accepted mail",
                    job_id=record.job.job_id,
                )
            waits[record.job] = _OVER
            cooling.discard(record.sender_id)
            continue
        if record.sender_id in cooling and not signal.probe:
            continue  # it was in flight when the first attempt was refused
        if signal.refused or await _completes_row(connection, record, rules):
            wait = await _cool_down(connection, record, signal, rules, now)
            if wait is not None:
                waits[record.job] = wait
                cooling.add(record.sender_id)
    return waits


async def _completes_row(
    connection: AsyncConnection, record: AttemptRecord, rules: CooldownRules
) -> bool:
    """Return whether this refusal completes OUTBOX_REFUSALS_IN_A_ROW."""
    if record.reply_class is not ReplyClass.REFUSED or not rules.refusals_in_a_row:
        return False
    return await storage.refused_in_a_row(connection, record.sender_id, rules.refusals_in_a_row)


async def _cool_down(
    connection: AsyncConnection,
    record: AttemptRecord,
    signal: Signal,
    rules: CooldownRules,
    now: float,
) -> timedelta | None:
    refusal = AccountRefusal(
        sender_id=record.sender_id,
        started=timedelta(seconds=now - record.started),
        ended=timedelta(seconds=now - record.ended),
        message=record.message or "",
        smtp_code=record.smtp_code,
        enhanced_code=record.enhanced_code,
        daily=signal.daily,
    )
    wait = await storage.cool_down(connection, refusal, backoff=rules.backoff, day=rules.day)
    if wait is None:
        return None
    _log.warning(
        "sender_cools_down",
        sender=record.sender_id,
        job_id=record.job.job_id,
        next_probe_in=f"{wait.total_seconds():.1f} s",
        smtp_code=record.smtp_code,
        enhanced_code=record.enhanced_code,
        reply=record.message,
    )
    return wait
