"""The report of an audit: which promises were broken, as a JSON document and for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from outbox_server.shared.audit.installation import Findings
from outbox_server.shared.audit.replay import Replay
from outbox_server.shared.audit.storage import AuditedSender
from outbox_server.shared.durations import format_duration
from outbox_server.shared.gap import effective_gap
from outbox_server.shared.queue.user_limits import UserSendLimits
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import JobState

# PostgreSQL records an end when the statement arrives, so it may be later than the real end.
RECORDING_SLACK_S: Final = 0.1
_CHECKED_BY: Final = {True: "smtp side", False: "postgresql"}


@dataclass(frozen=True, slots=True)
class SenderCheck:
    """The sends of one sender, compared with its current limits."""

    sender: AuditedSender
    min_gap_s: float
    replay: Replay
    # Whether the replay has the times of the SMTP side. Otherwise it has the times of PostgreSQL.
    by_smtp_side: bool

    @property
    def slack_s(self) -> float:
        """The error that a time may have, in seconds."""
        return 0.0 if self.by_smtp_side else RECORDING_SLACK_S

    @property
    def overshoot(self) -> int:
        """The number of mails by which its limit was exceeded."""
        return self.replay.overshoot(self.slack_s)

    @property
    def gap_broken(self) -> bool:
        """Whether a gap was shorter than it must be."""
        gap = self.replay.least_gap
        return gap is not None and self.min_gap_s > 0 and gap < self.min_gap_s - self.slack_s

    @property
    def margin(self) -> float:
        """The distance to its limits, as a fraction of them; negative if a limit was exceeded."""
        window = 1 - self.replay.most_in_window / self.sender.hourly_limit
        gap = self.replay.least_gap
        if gap is None or not self.min_gap_s:
            return window
        return min(window, gap / self.min_gap_s - 1)

    def broken(self, window: str) -> Iterator[str]:
        """Yield the broken promises, one per line."""
        sender, replay = self.sender, self.replay
        if self.gap_broken:
            yield (
                f"{sender.email} (sender {sender.sender_id}): a gap of {replay.least_gap:.3f} s, "
                f"less than {self.min_gap_s:g} s"
            )
        if self.overshoot:
            yield (
                f"{sender.email} (sender {sender.sender_id}): {replay.most_in_window} mails within "
                f"{window}, more than {sender.hourly_limit}"
            )


@dataclass(frozen=True, slots=True)
class UserCheck:
    """The sends of all senders of one user, compared with the limits that they share."""

    user_id: str
    limits: UserSendLimits
    replay: Replay
    by_smtp_side: bool

    def broken(self, window: str) -> Iterator[str]:
        """Yield the broken promises, one per line."""
        slack = 0.0 if self.by_smtp_side else RECORDING_SLACK_S
        gap, least = self.replay.least_gap, self.limits.gap.total_seconds()
        if gap is not None and least and gap < least - slack:
            yield f"user {self.user_id}: a gap of {gap:.3f} s, less than {least:g} s"
        if self.replay.overshoot(slack):
            yield (
                f"user {self.user_id}: {self.replay.most_in_window} mails within {window}, more "
                f"than {self.limits.hourly_limit}"
            )

    def document(self) -> dict[str, Any]:
        """Return its part of the JSON document."""
        gap = self.replay.least_gap
        return {
            "user_id": self.user_id,
            "checked_by": _CHECKED_BY[self.by_smtp_side],
            "sends": self.replay.sends,
            "checked": self.replay.checked,
            "hourly_limit": self.limits.hourly_limit,
            "most_in_window": self.replay.most_in_window,
            "min_gap_s": self.limits.gap.total_seconds(),
            "least_gap_s": None if gap is None else round(gap, 6),
        }


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The findings of an audit, with the settings that they are compared with."""

    findings: Findings
    settings: Settings

    @property
    def by_smtp_side(self) -> bool:
        """Whether gaps and windows are checked with the times of the SMTP side."""
        return self.findings.seen is not None

    @property
    def senders(self) -> list[SenderCheck]:
        """All senders that have sent, ordered by the distance to their limits, closest first."""
        checks = [self._check(sender) for sender in self.findings.senders.values()]
        return sorted(filter(None, checks), key=lambda check: check.margin)

    @property
    def users(self) -> list[UserCheck]:
        """All users with limits for all their senders together."""
        elsewhere = {
            self.findings.senders[sender_id].user_id
            for sender_id in self.findings.jobs.senders_elsewhere
        }
        checks = []
        for user in self.findings.users:
            # If mail of the user also went elsewhere, the SMTP side saw only some of it.
            seen = None if user.user_id in elsewhere else user.seen
            replay = user.recorded if seen is None else seen
            checks.append(UserCheck(user.user_id, user.limits, replay, seen is not None))
        return checks

    def _check(self, sender: AuditedSender) -> SenderCheck | None:
        replays, by_smtp_side = self.findings.recorded, False
        # If mail of the sender also went elsewhere, the SMTP side saw only some of its sends.
        if sender.sender_id not in self.findings.jobs.senders_elsewhere:
            replays, by_smtp_side = self.findings.seen or replays, self.by_smtp_side
        replay = replays.get(sender.sender_id)
        if replay is None:
            return None
        return SenderCheck(sender, self._gap_s(sender), replay, by_smtp_side)

    @property
    def lost(self) -> int:
        """Accepted jobs that are missing, stuck, or SENT but never seen by the SMTP side."""
        totals = self.findings.totals
        return totals.missing + totals.stuck + self.findings.jobs.lost

    @property
    def unknown(self) -> int:
        """Mails of jobs that PostgreSQL does not have, beyond the jobs that it has removed."""
        return max(0, self.findings.jobs.unknown - self.findings.totals.purged)

    @property
    def compared_with(self) -> str:
        """The settings that the sends were compared with."""
        window = format_duration(self.settings.rate_window)
        floor = format_duration(self.settings.min_gap)
        return (
            f"each sender's hourly_limit in any {window} (OUTBOX_RATE_WINDOW) and its min_gap, at "
            f"least {floor} (OUTBOX_MIN_GAP), and with the limits of each user, as they are now; "
            "sends before the last change of their sender, user or these settings are not "
            "checked"
        )

    @property
    def broken(self) -> list[str]:
        """The promises that were broken, one per line; empty if all were kept."""
        findings, jobs, totals = self.findings, self.findings.jobs, self.findings.totals
        found = (
            (totals.missing, "accepted jobs have no row"),
            (totals.stuck, "jobs are SENDING long after their lease: does a dispatcher run?"),
            (jobs.lost, "jobs were sent, but the SMTP side never saw them"),
            (jobs.unexplained, "mails were sent again, although no attempt was in doubt"),
            (jobs.renamed, "jobs have copies with different Message-IDs"),
            (self.unknown, "mails belong to jobs that PostgreSQL does not have"),
            (jobs.contradictions, "jobs have contradictory data"),
            (findings.stats_mismatch, "counts differ from a recount"),
        )
        lines = [f"{number} {text}" for number, text in found if number]
        window = format_duration(self.settings.rate_window)
        for check in self.senders:
            lines += check.broken(window)
        for user in self.users:
            lines += user.broken(window)
        return lines + [f"for example: {text}" for text in jobs.examples]

    def _gap_s(self, sender: AuditedSender) -> float:
        return effective_gap(sender.min_gap_ms, self.settings.min_gap).total_seconds()

    def figures(self) -> dict[str, Any]:
        """Return the figures that are also in the document of `outbox drill`."""
        senders, jobs, by_state = self.senders, self.findings.jobs, self.findings.totals.by_state
        # Without a gap, several sends of a sender may be in flight at once.
        with_gap = [one.replay.least_gap for one in senders if one.min_gap_s > 0]
        gaps = [gap for gap in with_gap if gap is not None]
        states = (JobState.SENT, JobState.FAILED, JobState.UNCERTAIN)
        return {
            "accepted": self.findings.totals.accepted,
            **{state.name.lower(): by_state.get(state, 0) for state in states},
            "sent_elsewhere": jobs.elsewhere,
            "lost": self.lost,
            "duplicates": jobs.duplicates,
            "duplicates_unexplained": jobs.unexplained,
            "in_doubt": self.findings.totals.in_doubt,
            "overshoot": sum(one.overshoot for one in senders),
            "least_gap_s": round(min(gaps), 6) if gaps else None,
            "most_in_window": max((one.replay.most_in_window for one in senders), default=0),
            "message_ids_changed": jobs.renamed,
            "contradictions": jobs.contradictions,
            "stats_mismatch": self.findings.stats_mismatch,
        }

    def document(self) -> dict[str, Any]:
        """Return the JSON document of `-o json`."""
        by_state = self.findings.totals.by_state
        return {
            **self.figures(),
            "purged": self.findings.totals.purged,
            "states": {state.name.lower(): by_state.get(state, 0) for state in JobState},
            "seen": self.findings.jobs.seen,
            "checked_by": _CHECKED_BY[self.by_smtp_side],
            "compared_with": {
                "rate_window": format_duration(self.settings.rate_window),
                "min_gap": format_duration(self.settings.min_gap),
                "slack_s": max((one.slack_s for one in self.senders), default=0.0),
            },
            "senders": [_sender(check) for check in self.senders],
            "users": [check.document() for check in self.users],
            "broken": self.broken,
        }


def _sender(check: SenderCheck) -> dict[str, Any]:
    sender, replay = check.sender, check.replay
    return {
        "sender_id": str(sender.sender_id),
        "email": sender.email,
        "checked_by": _CHECKED_BY[check.by_smtp_side],
        "sends": replay.sends,
        # May be fewer than `sends`, because sends before the sender's last change are not checked.
        "checked": replay.checked,
        "hourly_limit": sender.hourly_limit,
        "most_in_window": replay.most_in_window,
        "min_gap_s": check.min_gap_s,
        "least_gap_s": None if replay.least_gap is None else round(replay.least_gap, 6),
    }
