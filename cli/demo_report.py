"""Compares the mails that arrived in the demo's inbox with accepted jobs and limits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from outbox_server.deploy.record import ReceivedMail, least_gap_s, most_in_any_window
from outbox_server.shared.audit.jobs import sent_twice


@dataclass(frozen=True, slots=True)
class ExpectedMails:
    """The mails and limits that are expected of one sender."""

    sender_id: str
    email: str
    hourly_limit: int
    min_gap_s: float
    accepted: int
    rejected: int
    sent: int
    failed: int
    # The Message-IDs of all mails that must have arrived.
    message_ids: frozenset[str]


@dataclass(frozen=True, slots=True)
class SenderReport:
    """What arrived from one sender. `least_gap_s` is None for fewer than two mails."""

    expected: ExpectedMails
    lost: int
    duplicates: int
    least_gap_s: float | None
    most_in_window: int

    @property
    def broken(self) -> list[str]:
        """The broken promises, one line each."""
        expected = self.expected
        found = []
        if self.lost:
            found.append(f"{expected.email}: {self.lost} accepted mails did not arrive")
        if self.duplicates:
            found.append(f"{expected.email}: {self.duplicates} mails arrived more than once")
        if self.least_gap_s is not None and self.least_gap_s < expected.min_gap_s:
            found.append(
                f"{expected.email}: a gap of {self.least_gap_s:.3f} s, less than "
                f"{expected.min_gap_s:g} s"
            )
        if self.most_in_window > expected.hourly_limit:
            found.append(
                f"{expected.email}: {self.most_in_window} mails in one window, more than "
                f"{expected.hourly_limit}"
            )
        return found


def report_on(
    expected: ExpectedMails, mails: Sequence[ReceivedMail], window_s: float
) -> SenderReport:
    """Compare what one sender should have sent with the inbox's record of all mails."""
    own = [mail for mail in mails if mail.mail_from == expected.email]
    arrived = {mail.message_id for mail in own}
    missing = expected.message_ids - arrived
    # Jobs that are no longer listed count as lost, like mails that did not arrive.
    unnamed = expected.accepted - expected.failed - len(expected.message_ids)
    return SenderReport(
        expected=expected,
        lost=len(missing) + max(unnamed, 0),
        duplicates=sum(sent_twice(mail.message_id for mail in own).values())
        - len(sent_twice(mail.message_id for mail in own)),
        least_gap_s=least_gap_s(own),
        most_in_window=most_in_any_window(own, window_s).get(expected.email, 0),
    )


def to_document(
    reports: Collection[SenderReport], *, window_s: float, seconds: float, inbox: str
) -> dict[str, Any]:
    """Return the JSON document for `-o json`."""
    gaps = [report.least_gap_s for report in reports if report.least_gap_s is not None]
    return {
        "accepted": sum(report.expected.accepted for report in reports),
        "rejected": sum(report.expected.rejected for report in reports),
        "sent": sum(report.expected.sent for report in reports),
        "failed": sum(report.expected.failed for report in reports),
        "lost": sum(report.lost for report in reports),
        "duplicates": sum(report.duplicates for report in reports),
        "least_gap_s": round(min(gaps), 6) if gaps else None,
        "most_in_window": max((report.most_in_window for report in reports), default=0),
        "seconds": round(seconds, 1),
        "inbox": inbox,
        "window_s": window_s,
        "senders": [_sender(report) for report in reports],
        "broken": [line for report in reports for line in report.broken],
    }


def _sender(report: SenderReport) -> dict[str, Any]:
    expected = report.expected
    gap = report.least_gap_s
    return {
        "sender_id": expected.sender_id,
        "email": expected.email,
        "hourly_limit": expected.hourly_limit,
        "min_gap_s": expected.min_gap_s,
        "accepted": expected.accepted,
        "rejected": expected.rejected,
        "sent": expected.sent,
        "failed": expected.failed,
        "lost": report.lost,
        "duplicates": report.duplicates,
        "least_gap_s": None if gap is None else round(gap, 6),
        "most_in_window": report.most_in_window,
    }
