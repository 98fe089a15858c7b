"""The report of a drill: its audit, and the drill's own observations."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from outbox_server.deploy.drill.run import RECOVERY_LIMIT_S, DrillOutcome
from outbox_server.deploy.record import ReceivedMail
from outbox_server.shared.audit.report import AuditReport


@dataclass(frozen=True, slots=True)
class DrillReport:
    """The audit's report, together with the answers and mails that the drill saw."""

    outcome: DrillOutcome
    audit: AuditReport
    policy: str
    # Number of recipients (each has one job) whose mails had different Message-IDs.
    renamed: int

    @property
    def broken(self) -> list[str]:
        """The promises that were broken, one per line."""
        outcome, figures = self.outcome, self.audit.figures()
        accepted, recorded = outcome.answered.accepted, figures["accepted"]
        copies = figures["duplicates"] if self.policy == "hold" else 0
        given_up = max(0, figures["failed"] - outcome.refused)
        found = (
            (outcome.open_jobs, "jobs are not in a final state, and none changes any more"),
            (max(0, accepted - recorded), "jobs were reported as accepted, but do not exist"),
            (max(0, recorded - accepted), "jobs exist in addition to those reported as accepted"),
            (figures["sent_elsewhere"], "mails went to another server than the inbox"),
            (self.renamed, "recipients got different Message-IDs for one job"),
            (given_up, "jobs FAILED although their mail was not permanently refused"),
            (copies, "mails came twice, although mails in doubt are held"),
            (outcome.unanswered, "or more uploads were never answered"),
        )
        lines = [f"{int(number)} {text}" for number, text in found if number]
        wrong = Counter(outcome.answered.wrong)
        lines += [f"{number} answers: {text}" for text, number in wrong.items()]
        lines += [
            f"{RECOVERY_LIMIT_S:.0f} s after {one.fault.name}: {one.missing}"
            for one in outcome.faults
            if one.missing
        ]
        lines += [*outcome.over_limits, *outcome.held_and_sent, *outcome.rolled.problems]
        return lines + self.audit.broken

    @property
    def recoveries(self) -> dict[str, list[float]]:
        """Seconds from the end of each fault to the next mail, by kind."""
        found: dict[str, list[float]] = defaultdict(list)
        for one in self.outcome.faults:
            if one.recovery_s is not None:
                found[one.fault.name].append(one.recovery_s)
        return dict(sorted(found.items()))

    def document(self, **more: Any) -> dict[str, Any]:
        """Return the one document of `-o json`."""
        figures = self.audit.figures()
        figures["lost"] += max(0, self.outcome.answered.accepted - figures["accepted"])
        figures["lost"] += self.outcome.open_jobs
        return {
            **more,
            **figures,
            "accepted": self.outcome.answered.accepted,
            "batches": len(self.outcome.answered.batches),
            "refused": self.outcome.refused,
            "open": self.outcome.open_jobs,
            "cancelled": self.outcome.answered.cancelled,
            "repeated_calls": dict(sorted(self.outcome.answered.repeated.items())),
            "faults": dict(sorted(Counter(one.fault.name for one in self.outcome.faults).items())),
            "recovery_s": {
                name: {"median": round(statistics.median(times), 3), "most": round(max(times), 3)}
                for name, times in self.recoveries.items()
            },
            "users": [check.document() for check in self.audit.users],
            "replaced_processes": self.outcome.rolled.replaced,
            "longest_end_s": round(self.outcome.rolled.longest_end_s, 1),
            "seconds": round(self.outcome.seconds, 1),
            "broken": self.broken,
        }


def renamed_recipients(mails: Iterable[ReceivedMail]) -> int:
    """Return how many recipients got mails with different Message-IDs."""
    found: dict[str, set[str]] = defaultdict(set)
    for mail in mails:
        found[mail.rcpt_tos[0]].add(mail.message_id)
    return sum(len(names) > 1 for names in found.values())
