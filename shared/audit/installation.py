"""Audits a whole installation: reads PostgreSQL and what the SMTP side kept, and compares both."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.audit import storage
from outbox_server.shared.audit.jobs import Copies, contradiction_of, delivery_of
from outbox_server.shared.audit.replay import Replay
from outbox_server.shared.audit.storage import AuditedSender, Totals
from outbox_server.shared.database.engine import create_engine, snapshot
from outbox_server.shared.database.message_ids import job_of_message_id
from outbox_server.shared.settings import Settings

_EXAMPLES: Final = 5


class SmtpSide(Protocol):
    """The mails that a receiving server kept."""

    @property
    def receiver_id(self) -> str | None:
        """The text that the server puts in each reply to a mail that it accepts.

        What has another reply went to another server. None: the server has no such text, and is
        taken to have received everything that was sent.
        """

    def message_ids(self) -> Iterable[str]:
        """Return the Message-ID of every mail.

        Raises:
            FileNotFoundError: there is no such file or folder.
            ValueError: it is no record.
        """

    def sends(self) -> Iterable[tuple[str, float, float]] | None:
        """Return (Message-ID, start, end) of every mail by the ends; None: no times were kept.

        Times are seconds since 1970.
        """


@dataclass
class JobFindings:
    """What the jobs, their attempts and the copies of their mails come to."""

    # None: nobody looked at the SMTP side.
    seen: int | None = None
    lost: int = 0
    duplicates: int = 0
    unexplained: int = 0
    renamed: int = 0
    # Mails of jobs that PostgreSQL does not know.
    unknown: int = 0
    contradictions: int = 0
    # Jobs that were sent to another server than the one looked at, and their senders.
    elsewhere: int = 0
    senders_elsewhere: set[int] = field(default_factory=set)
    # What was found of some of them, for people.
    examples: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Keep a few of the findings."""
        if len(self.examples) < _EXAMPLES:
            self.examples.append(text)


@dataclass
class Findings:
    """All that an audit found; `shared.audit.report` says what of it breaks a promise."""

    senders: dict[int, AuditedSender]
    totals: Totals
    stats_mismatch: int
    jobs: JobFindings
    # By sender: as PostgreSQL recorded the sends; as the SMTP side saw them, if it kept times.
    recorded: dict[int, Replay]
    seen: dict[int, Replay] | None


async def audit_installation(settings: Settings, smtp_side: SmtpSide | None) -> Findings:
    """Audit the installation of `settings`, of which window, gap and lease count too.

    Without an `smtp_side`, all is judged by PostgreSQL alone.

    Raises:
        FileNotFoundError: the SMTP side's file or folder is not there.
        ValueError: it is no record.
        sqlalchemy.exc.SQLAlchemyError: PostgreSQL is gone, or has no schema.
    """
    # An audit of a large installation takes its time.
    engine = create_engine(settings, patient=True)
    try:
        async with snapshot(engine) as connection:
            return await _audit(connection, settings, smtp_side)
    finally:
        await engine.dispose()


async def _audit(
    connection: AsyncConnection, settings: Settings, smtp_side: SmtpSide | None
) -> Findings:
    senders = await storage.read_senders(connection)
    totals = await storage.read_totals(connection)
    installation = await storage.installation_id(connection) or ""
    sender_of = array("q", bytes(8 * (totals.highest_job_id + 1)))
    # The SMTP side after the snapshot: of a job that was SENT by then it has the mail.
    copies = None if smtp_side is None else _copies(smtp_side, installation, totals)
    receiver_id = None if smtp_side is None else smtp_side.receiver_id
    jobs = await _jobs(connection, copies, receiver_id, sender_of)
    recorded = _Replays(senders, settings)
    async for sender_id, start, end in storage.stream_sends(connection):
        recorded.add(sender_id, start, end)
    seen = None
    sends = None if smtp_side is None else smtp_side.sends()
    if sends is not None:
        seen = _Replays(senders, settings)
        for message_id, start, end in sends:
            job_id = job_of_message_id(message_id, installation)
            if job_id is not None and job_id < len(sender_of) and sender_of[job_id]:
                seen.add(sender_of[job_id], start, end)
    return Findings(
        senders=senders,
        totals=totals,
        stats_mismatch=await storage.stats_mismatch(connection),
        jobs=jobs,
        recorded=recorded.by_sender,
        seen=None if seen is None else seen.by_sender,
    )


def _copies(smtp_side: SmtpSide, installation: str, totals: Totals) -> Copies:
    copies = Copies(totals.highest_job_id)
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
        sender_of[job.job_id] = sender_id
        came = None if copies is None else copies.of(job.job_id)
        delivery = delivery_of(job, came)
        found.lost += delivery.lost
        found.duplicates += delivery.duplicates
        found.unexplained += delivery.unexplained
        if delivery.elsewhere:
            found.elsewhere += 1
            found.senders_elsewhere.add(sender_id)
        if delivery.lost:
            found.note(f"job {job.job_id} was sent, and the SMTP side never saw it")
        if delivery.unexplained:
            sent = f"{job.sent} sent, {job.doubtful} in doubt"
            copies_seen = "" if came is None else f"came {came} times, with "
            found.note(f"job {job.job_id} ({job.state.name}) {copies_seen}attempts: {sent}")
        contradiction = contradiction_of(job)
        if contradiction:
            found.contradictions += 1
            found.note(f"job {job.job_id}: {contradiction}")
    if copies is not None:
        found.renamed = len(copies.renamed)
        for job_id in copies.jobs():
            found.seen = (found.seen or 0) + copies.of(job_id)
            found.unknown += not sender_of[job_id]
    return found


class _Replays:
    """One replay a sender, made at its first send."""

    def __init__(self, senders: dict[int, AuditedSender], settings: Settings) -> None:
        self._senders = senders
        self._window = settings.rate_window.total_seconds()
        # A send that began within this after a change may have been claimed before it.
        self._lease = settings.lease.total_seconds()
        self.by_sender: dict[int, Replay] = {}

    def add(self, sender_id: int, start: float, end: float) -> None:
        replay = self.by_sender.get(sender_id)
        if replay is None:
            sender = self._senders[sender_id]
            changed = sender.changed_at
            since = None if changed is None else changed.timestamp() + self._lease
            replay = Replay(self._window, sender.hourly_limit, since)
            self.by_sender[sender_id] = replay
        replay.add(start, end)
