"""Carries out an audit: reads PostgreSQL and the SMTP side, and hands both to `shared.audit`."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from cli import audit_sql
from cli.audit_sql import AuditedSender, Totals
from deploy.local.record import iterate_record, message_ids_in
from shared.audit import Copies, Replay, contradiction_of, delivery_of
from shared.database import create_engine
from shared.message_ids import job_of_message_id
from shared.settings import Settings

_EXAMPLES: Final = 5


@dataclass(frozen=True, slots=True)
class SmtpSide:
    """What the other side of SMTP kept: a record with times, or a Maildir without them."""

    record: Path | None = None
    maildir: Path | None = None

    def message_ids(self) -> Iterator[str]:
        """Return the Message-ID of every mail.

        Raises:
            FileNotFoundError: there is no such file or folder.
            ValueError: it is no record.
        """
        if self.record is not None:
            yield from (mail.message_id for mail in iterate_record(self.record))
        elif self.maildir is not None:
            yield from message_ids_in(self.maildir)


@dataclass
class Jobs:
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
    # What was found of some of them, for people.
    examples: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Keep a few of the findings."""
        if len(self.examples) < _EXAMPLES:
            self.examples.append(text)


@dataclass
class Findings:
    """All that an audit found; `cli.audit_report` says what of it breaks a promise."""

    senders: dict[int, AuditedSender]
    totals: Totals
    stats_mismatch: int
    jobs: Jobs
    # By sender: as PostgreSQL recorded the sends; as the SMTP side saw them, if it kept times.
    recorded: dict[int, Replay]
    seen: dict[int, Replay] | None


async def audit(settings: Settings, smtp_side: SmtpSide) -> Findings:
    """Audit the installation of `settings`, of which window, gap and lease count too.

    Raises:
        FileNotFoundError: the SMTP side's file or folder is not there.
        ValueError: it is no record.
        sqlalchemy.exc.SQLAlchemyError: PostgreSQL is gone, or has no schema.
    """
    # An audit of a large installation takes its time.
    engine = create_engine(settings, patient=True)
    try:
        async with audit_sql.snapshot(engine) as connection:
            return await _audit(connection, settings, smtp_side)
    finally:
        await engine.dispose()


async def _audit(connection: AsyncConnection, settings: Settings, smtp_side: SmtpSide) -> Findings:
    senders = await audit_sql.read_senders(connection)
    totals = await audit_sql.read_totals(connection)
    installation = await audit_sql.installation_id(connection) or ""
    sender_of = array("q", bytes(8 * (totals.highest_job_id + 1)))
    # The SMTP side after the snapshot: of a job that was SENT by then it has the mail.
    jobs = await _jobs(connection, _copies(smtp_side, installation, totals), sender_of)
    recorded = _Replays(senders, settings)
    async for sender_id, start, end in audit_sql.stream_sends(connection):
        recorded.add(sender_id, start, end)
    seen = None
    if smtp_side.record is not None:
        seen = _Replays(senders, settings)
        for mail in iterate_record(smtp_side.record):
            job_id = job_of_message_id(mail.message_id, installation)
            if job_id is not None and job_id < len(sender_of) and sender_of[job_id]:
                seen.add(sender_of[job_id], mail.started_at, mail.received_at)
    return Findings(
        senders=senders,
        totals=totals,
        stats_mismatch=await audit_sql.stats_mismatch(connection),
        jobs=jobs,
        recorded=recorded.by_sender,
        seen=None if seen is None else seen.by_sender,
    )


def _copies(smtp_side: SmtpSide, installation: str, totals: Totals) -> Copies | None:
    if smtp_side == SmtpSide():
        return None
    copies = Copies(totals.highest_job_id)
    for message_id in smtp_side.message_ids():
        job_id = job_of_message_id(message_id, installation)
        if job_id is not None:
            copies.add(job_id, message_id)
    return copies


async def _jobs(connection: AsyncConnection, copies: Copies | None, sender_of: array[int]) -> Jobs:
    found = Jobs(seen=None if copies is None else 0)
    async for job, sender_id in audit_sql.stream_jobs(connection):
        sender_of[job.job_id] = sender_id
        came = None if copies is None else copies.of(job.job_id)
        delivery = delivery_of(job, came)
        found.lost += delivery.lost
        found.duplicates += delivery.duplicates
        found.unexplained += delivery.unexplained
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
