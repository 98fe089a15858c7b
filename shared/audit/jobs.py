"""Compares each job's attempts with the copies of its mail. Pure: no driver is imported."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from outbox_server.shared.states import FINAL_STATES, JobState

# The numbers that an array of 16 bits can hold.
_NAMES: Final = 65_536


def sent_twice(message_ids: Iterable[str]) -> dict[str, int]:
    """Return how often each Message-ID came, for those that came more than once."""
    return {name: times for name, times in Counter(message_ids).items() if times > 1}


class Copies:
    """How often the mail of each job came: three bytes a job, for the ids of jobs are dense."""

    def __init__(self, highest_job_id: int) -> None:
        """Take the highest id that there is: what is said to be beyond it is not counted."""
        self._times = bytearray(highest_job_id + 1)
        self._names = array("H", bytes(2 * (highest_job_id + 1)))
        self._known: dict[str, int] = {}
        # Jobs whose copies had different Message-IDs.
        self.renamed: set[int] = set()

    def add(self, job_id: int, message_id: str) -> None:
        """Count one copy of a job's mail."""
        if job_id >= len(self._times):
            return
        # What follows the job's own number is that of a domain: there are few of them.
        rest = message_id.replace(str(job_id), "", 1)
        name = self._known.setdefault(rest, len(self._known) % _NAMES)
        if self._times[job_id] and self._names[job_id] != name:
            self.renamed.add(job_id)
        self._names[job_id] = name
        self._times[job_id] = min(self._times[job_id] + 1, 255)

    def of(self, job_id: int) -> int:
        """Return how many copies came; 255 stands for more."""
        return self._times[job_id] if job_id < len(self._times) else 0

    def jobs(self) -> Iterator[int]:
        """Return the jobs whose mail came."""
        return (job_id for job_id, times in enumerate(self._times) if times)


@dataclass(frozen=True, slots=True)
class JobTrace:
    """What PostgreSQL says of one job: its state, and its attempts in numbers."""

    job_id: int
    state: JobState
    # The number of its newest attempt, and of the newest that was recorded.
    attempt: int
    recorded: int
    # Attempts that SMTP answered with 250.
    sent: int
    # Those of them whose reply shows that the audited SMTP side accepted the mail.
    sent_to_smtp_side: int
    # Attempts of which nobody knows whether they sent it.
    doubtful: int
    # An attempt began after the job had reached its final state.
    began_after_end: bool


def contradiction_of(job: JobTrace) -> str | None:
    """Return what cannot be true of a job at once; None: all of it can."""
    # A batch is cancelled as a whole, at one instant. What was SENDING by then ends as SENT or, if
    # its attempt fails, as CANCELLED from that instant on: the attempt may be the younger one.
    if job.began_after_end and job.state is not JobState.CANCELLED:
        return f"an attempt began after it was {job.state.name}"
    if job.recorded > job.attempt:
        return f"it has attempt {job.recorded}, and counts {job.attempt}"
    if job.sent and job.state is not JobState.SENT:
        return f"it was sent, and is {job.state.name}"
    # A caller may have said of one in doubt that it was sent.
    if job.state is JobState.SENT and not job.sent and not job.doubtful:
        return "it is SENT, and no attempt sent it"
    return None


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the copies of a job's mail and its attempts show together."""

    # The SMTP side accepted the mail, and has no copy of it.
    lost: bool
    # Copies beyond the first; and those of them that no attempt in doubt explains.
    duplicates: int
    unexplained: int
    # Recorded sends to a server that nobody looked at: PostgreSQL alone judges them.
    elsewhere: int = 0


def delivery_of(job: JobTrace, copies: int | None) -> Delivery:
    """Compare a job with the `copies` of it that the SMTP side saw; None: nobody looked there."""
    # A second recorded send explains nothing: it is the fault itself.
    sent_again = max(0, job.sent - 1)
    if copies is None:
        return Delivery(lost=False, duplicates=sent_again, unexplained=sent_again)
    # An open one may have been sent since PostgreSQL was read.
    unrecorded = job.doubtful + (job.state not in FINAL_STATES)
    # A copy that only a send without a known reply explains shows that this send came here too.
    came_unknown = max(0, copies - job.sent_to_smtp_side - unrecorded)
    elsewhere = max(0, job.sent - job.sent_to_smtp_side - came_unknown)
    return Delivery(
        lost=job.sent_to_smtp_side > 0 and copies == 0,
        duplicates=max(0, copies + elsewhere - 1),
        unexplained=max(sent_again, copies - job.sent - unrecorded),
        elsewhere=elsewhere,
    )
