"""Audits a whole installation: compares PostgreSQL with the mails that the SMTP side received."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.agreed.storage import read_agreed, read_limits_change
from outbox_server.shared.audit import storage
from outbox_server.shared.audit.jobs import Copies, JobNumbers, contradiction_of, delivery_of
from outbox_server.shared.audit.recount import stats_mismatch
from outbox_server.shared.audit.replay import Replay
from outbox_server.shared.audit.storage import AuditedSender, AuditedUser, Totals
from outbox_server.shared.database.engine import create_engine, snapshot
from outbox_server.shared.database.message_ids import job_of_message_id
from outbox_server.shared.queue.user_limits import UserSendLimits
from outbox_server.shared.settings import Settings

_EXAMPLES: Final = 5


class SmtpSide(Protocol):
    """The mails that a receiving server has stored."""

    @property
    def receiver_id(self) -> str | None:
        """The text that the server puts in each reply to a mail that it accepts.

        A mail with another reply went to another server. None means that the server has no such
        text; then it is assumed to have received all mail.
        """

    def message_ids(self) -> Iterable[str]:
        """Return the Message-ID of every mail.

        Raises:
            FileNotFoundError: the file or folder does not exist.
            ValueError: the file is not a record.
        """

    def sends(self) -> Iterable[tuple[str, float, float]] | None:
        """Return (Message-ID, start, end) of every mail, ordered by end; None without times.

        Times are seconds since 1970.
        """


@dataclass
class JobFindings:
    """The result of comparing jobs with their attempts and the copies of their mails."""

    # Number of mails on the SMTP side. None means that the SMTP side was not read.
    seen: int | None = None
    lost: int = 0
    duplicates: int = 0
    unexplained: int = 0
    renamed: int = 0
    # Mails of jobs that PostgreSQL does not know.
    unknown: int = 0
    contradictions: int = 0
    # Jobs that were sent to a server other than the audited one, and their senders.
    elsewhere: int = 0
    senders_elsewhere: set[int] = field(default_factory=set)
    # A few of the findings, for people.
    examples: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a finding to the examples, up to a few."""
        if len(self.examples) < _EXAMPLES:
            self.examples.append(text)


@dataclass
class UserReplays:
    """The sends of all senders of one user, and the limits that it has for them together."""

    user_id: str
    limits: UserSendLimits
    recorded: Replay
    # None if the SMTP side was not read.
    seen: Replay | None = None


@dataclass
class Findings:
    """The findings of an audit; `shared.audit.report` decides which of them break a promise."""

    senders: dict[int, AuditedSender]
    totals: Totals
    stats_mismatch: int
    jobs: JobFindings
    # By sender: the sends that PostgreSQL recorded, and those that the SMTP side saw, with times.
    recorded: dict[int, Replay]
    seen: dict[int, Replay] | None
    # The settings that they were compared with, including the stored settings.
    settings: Settings
    # The same for each user with limits for all its senders together.
    users: list[UserReplays] = field(default_factory=list)


async def audit_installation(settings: Settings, smtp_side: SmtpSide | None) -> Findings:
    """Audit the installation of `settings`, against their window, gap and lease.

    Without an `smtp_side`, only the data in PostgreSQL is checked.

    Raises:
        FileNotFoundError: the file or folder of the SMTP side does not exist.
        ValueError: the file is not a record.
        sqlalchemy.exc.SQLAlchemyError: PostgreSQL cannot be reached, or has no schema.
    """
    # The audit of a large installation takes long.
    engine = create_engine(settings, patient=True)
    try:
        async with snapshot(engine) as connection:
            return await _audit(connection, settings, smtp_side)
    finally:
        await engine.dispose()


async def _audit(
    connection: AsyncConnection, settings: Settings, smtp_side: SmtpSide | None
) -> Findings:
    agreed = await read_agreed(connection)
    if agreed is not None:
        settings = agreed.values.apply_to(settings)
    changed = await read_limits_change(connection)
    senders = {
        sender_id: replace(sender, changed_at=_later(sender.changed_at, changed))
        for sender_id, sender in (await storage.read_senders(connection)).items()
    }
    totals = await storage.read_totals(connection)
    installation = await storage.installation_id(connection) or ""
    numbers = JobNumbers()
    async for stored_id in storage.stream_job_ids(connection):
        numbers.add(stored_id)
    # The SMTP side is read after the snapshot, so that it has the mail of every job that is SENT.
    copies = None if smtp_side is None else _copies(smtp_side, installation, numbers)
    receiver_id = None if smtp_side is None else smtp_side.receiver_id
    # The sender of each job, by its number.
    sender_of = array("q")
    jobs = await _jobs(connection, copies, receiver_id, sender_of)
    recorded = _Replays(senders, settings)
    async for sender_id, start, end in storage.stream_sends(connection):
        recorded.add(sender_id, start, end)
    users = await _replay_users(connection, senders, settings, changed)
    seen = None
    sends = None if smtp_side is None else smtp_side.sends()
    if sends is None:
        users = {user_id: replace(user, seen=None) for user_id, user in users.items()}
    if sends is not None:
        seen = _Replays(senders, settings)
        for message_id, start, end in sends:
            job_id = job_of_message_id(message_id, installation)
            number = None if job_id is None else numbers.of(job_id)
            if number is not None:
                sender_id = sender_of[number]
                seen.add(sender_id, start, end)
                user = users.get(senders[sender_id].user_id)
                if user is not None and user.seen is not None:
                    user.seen.add(start, end)
    return Findings(
        senders=senders,
        totals=totals,
        stats_mismatch=await stats_mismatch(connection),
        jobs=jobs,
        recorded=recorded.by_sender,
        seen=None if seen is None else seen.by_sender,
        users=list(users.values()),
        settings=settings,
    )


async def _replay_users(
    connection: AsyncConnection,
    senders: dict[int, AuditedSender],
    settings: Settings,
    limits_changed: datetime | None,
) -> dict[str, UserReplays]:
    everyone = UserSendLimits.from_settings(settings)
    changed = await storage.read_users(connection)
    users: dict[str, UserReplays] = {}
    for user_id in sorted({sender.user_id for sender in senders.values()}):
        user = changed.get(user_id, AuditedUser(user_id))
        limits = everyone.overridden(user.hourly_limit, user.min_gap_ms)
        if limits:
            recorded, seen = (
                Replay(
                    settings.rate_window.total_seconds(),
                    limits.hourly_limit or sys.maxsize,
                    _since(_later(user.changed_at, limits_changed), settings),
                )
                for _ in range(2)
            )
            users[user_id] = UserReplays(user_id, limits, recorded, seen)
    if users:
        async for user_id, start, end in storage.stream_sends_of_users(connection, users):
            users[user_id].recorded.add(start, end)
    return users


def _later(one: datetime | None, other: datetime | None) -> datetime | None:
    return max((time for time in (one, other) if time is not None), default=None)


def _since(changed_at: datetime | None, settings: Settings) -> float | None:
    """Return the start of the sends to check after a change.

    A send that began within a lease after it may have been claimed before it.
    """
    return None if changed_at is None else changed_at.timestamp() + settings.lease.total_seconds()


def _copies(smtp_side: SmtpSide, installation: str, numbers: JobNumbers) -> Copies:
    copies = Copies(numbers)
    for message_id in smtp_side.message_ids():
        job_id = job_of_message_id(message_id, installation)
        if job_id is not None:
            copies.add(job_id, message_id)
    return copies


async def _jobs(
    connection: AsyncConnection,
    copies: Copies | None,
    receiver_id: str | None,
    sender_of: array[int],
) -> JobFindings:
    found = JobFindings(seen=None if copies is None else 0)
    async for job, sender_id in storage.stream_jobs(connection, receiver_id):
        sender_of.append(sender_id)
        came = None if copies is None else copies.of(job.job_id)
        delivery = delivery_of(job, came)
        found.lost += delivery.lost
        found.duplicates += delivery.duplicates
        found.unexplained += delivery.unexplained
        if delivery.elsewhere:
            found.elsewhere += 1
            found.senders_elsewhere.add(sender_id)
        if delivery.lost:
            found.note(f"job {job.job_id} was sent, but the SMTP side never saw it")
        if delivery.unexplained:
            sent = f"{job.sent} sent, {job.doubtful} in doubt"
            copies_seen = "" if came is None else f"arrived {came} times, with "
            found.note(f"job {job.job_id} ({job.state.name}) {copies_seen}attempts: {sent}")
        contradiction = contradiction_of(job)
        if contradiction:
            found.contradictions += 1
            found.note(f"job {job.job_id}: {contradiction}")
    if copies is not None:
        found.renamed = len(copies.renamed)
        found.seen, found.unknown = copies.seen, copies.unknown
    return found


class _Replays:
    """One replay per sender, created at its first send."""

    def __init__(self, senders: dict[int, AuditedSender], settings: Settings) -> None:
        self._senders = senders
        self._settings = settings
        self._window = settings.rate_window.total_seconds()
        self.by_sender: dict[int, Replay] = {}

    def add(self, sender_id: int, start: float, end: float) -> None:
        replay = self.by_sender.get(sender_id)
        if replay is None:
            sender = self._senders[sender_id]
            since = _since(sender.changed_at, self._settings)
            replay = Replay(self._window, sender.hourly_limit, since)
            self.by_sender[sender_id] = replay
        replay.add(start, end)
