"""Compares each job's attempts with the copies of its mail. Pure: no driver is imported."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from outbox_server.shared.states import FINAL_STATES, JobState

# The number of different values in an array of 16-bit numbers.
_NAMES: Final = 65_536


def sent_twice(message_ids: Iterable[str]) -> dict[str, int]:
    """Return how often each Message-ID arrived, for those that arrived more than once."""
    return {name: times for name, times in Counter(message_ids).items() if times > 1}


class JobNumbers:
    """The place of each job among all jobs, from 0. Takes eight bytes per job."""

    def __init__(self, job_ids: Iterable[int] = ()) -> None:
        """Take the ids of all jobs, in ascending order."""
        self._ids = array("q", job_ids)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, job_id: int) -> None:
        """Add the next job, whose id is the highest so far."""
        self._ids.append(job_id)

    def of(self, job_id: int) -> int | None:
        """Return the number of a job; None if there is no such job."""
        place = bisect_left(self._ids, job_id)
        return place if place < len(self._ids) and self._ids[place] == job_id else None

    @property
    def highest(self) -> int:
        """The highest id, or 0 without jobs."""
        return self._ids[-1] if self._ids else 0


class Copies:
    """The number of copies of each job's mail. Takes three bytes per job."""

    def __init__(self, numbers: JobNumbers) -> None:
        """Take all jobs. Mails with a higher id than theirs are not counted: they are newer."""
        self._numbers = numbers
        self._times = bytearray(len(numbers))
        self._names = array("H", bytes(2 * len(numbers)))
        self._known: dict[str, int] = {}
        # The ids of the copies of other jobs' mails.
        self._others = array("q")
        # Jobs whose copies had different Message-IDs.
        self.renamed: set[int] = set()

    def add(self, job_id: int, message_id: str) -> None:
        """Count one copy of a job's mail."""
        number = self._numbers.of(job_id)
        if number is None:
            if job_id < self._numbers.highest:
                self._others.append(job_id)
            return
        # The rest of the Message-ID depends only on the domain, so there are few values.
        rest = message_id.replace(str(job_id), "", 1)
        name = self._known.setdefault(rest, len(self._known) % _NAMES)
        if self._times[number] and self._names[number] != name:
            self.renamed.add(job_id)
        self._names[number] = name
        self._times[number] = min(self._times[number] + 1, 255)

    def of(self, job_id: int) -> int:
        """Return how many copies arrived; 255 means 255 or more."""
        number = self._numbers.of(job_id)
        return 0 if number is None else self._times[number]

    @property
    def seen(self) -> int:
        """The number of all copies."""
        return sum(self._times) + len(self._others)

    @property
    def unknown(self) -> int:
        """The number of jobs whose mail arrived although there is no such job."""
        return len(set(self._others))


@dataclass(frozen=True, slots=True)
class JobTrace:
    """One job in PostgreSQL: its state, and numbers about its attempts."""

    job_id: int
    state: JobState
    # The number of its newest attempt, and of the newest that was recorded.
    attempt: int
    recorded: int
    # Number of attempts that got a 250.
    sent: int
    # Number of these whose reply shows that the audited SMTP side accepted the mail.
    sent_to_smtp_side: int
    # Number of attempts whose outcome is unknown (in doubt, or the lease expired).
    doubtful: int
    # Whether an attempt began after the job had reached its final state.
    began_after_end: bool


def contradiction_of(job: JobTrace) -> str | None:
    """Return the contradiction in a job's data; None if there is none."""
    # A batch is cancelled at one instant. A job that was SENDING then ends as SENT or, if its
    # attempt fails, as CANCELLED with that instant. So its attempt may have begun later.
    if job.began_after_end and job.state is not JobState.CANCELLED:
        return f"an attempt began after it was {job.state.name}"
    if job.recorded > job.attempt:
        return f"it has attempt {job.recorded}, but its attempt count is {job.attempt}"
    if job.sent and job.state is not JobState.SENT:
        return f"it was sent, but is {job.state.name}"
    # A caller may have decided that a job in doubt was sent.
    if job.state is JobState.SENT and not job.sent and not job.doubtful:
        return "it is SENT, but no attempt sent it"
    return None


@dataclass(frozen=True, slots=True)
class Delivery:
    """The result of comparing the copies of a job's mail with its attempts."""

    # The SMTP side accepted the mail, but has no copy of it.
    lost: bool
    # Number of copies after the first, and of those that no attempt in doubt explains.
    duplicates: int
    unexplained: int
    # Number of recorded sends to servers that are not audited.
    elsewhere: int = 0


def delivery_of(job: JobTrace, copies: int | None) -> Delivery:
    """Compare a job with the copies on the SMTP side; `copies` is None if that was not read."""
    # A second recorded send does not explain a copy: it is the fault itself.
    sent_again = max(0, job.sent - 1)
    if copies is None:
        return Delivery(lost=False, duplicates=sent_again, unexplained=sent_again)
    # An open job may have been sent since PostgreSQL was read.
    unrecorded = job.doubtful + (job.state not in FINAL_STATES)
    # Copies beyond these must come from sends whose reply does not name the SMTP side.
    came_unknown = max(0, copies - job.sent_to_smtp_side - unrecorded)
    elsewhere = max(0, job.sent - job.sent_to_smtp_side - came_unknown)
    return Delivery(
        lost=job.sent_to_smtp_side > 0 and copies == 0,
        duplicates=max(0, copies + elsewhere - 1),
        unexplained=max(sent_again, copies - job.sent - unrecorded),
        elsewhere=elsewhere,
    )
