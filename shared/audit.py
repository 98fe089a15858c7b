"""What the promises come to, from the times and copies of real sends and what was recorded.

Pure arithmetic. Times are numbers in one unit of the caller's choice: ints of microseconds are
exact; floats of seconds since 1970 are good to 0.3 us.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeVar

from shared.states import FINAL_STATES, JobState

Time = TypeVar("Time", int, float)

# Of an array of 16 bits.
_NAMES: Final = 65_536


def least_gap(sends: Iterable[tuple[Time, Time]]) -> Time | None:
    """Return the least time from the end of a send of one sender to the start of its next.

    `sends` are (start, end), in any order. Negative: two overlapped. None: fewer than two sends.
    """
    # Neighbours will do: a send that outlasts its next has its least gap, a negative one, to that.
    neighbours = pairwise(sorted(sends))
    return min((start - end for (_, end), (start, _) in neighbours), default=None)


def most_in_window(ends: Iterable[Time], window: Time) -> int:
    """Return the most sends of one sender whose ends lie in one trailing window.

    At the instant t the window is (t - window, t]: an end has left it exactly `window` later.
    """
    inside: deque[Time] = deque()
    most = 0
    for end in sorted(ends):
        while inside and inside[0] <= end - window:
            inside.popleft()
        inside.append(end)
        most = max(most, len(inside))
    return most


def sent_twice(message_ids: Iterable[str]) -> dict[str, int]:
    """Return how often each Message-ID came, for those that came more than once."""
    return {name: times for name, times in Counter(message_ids).items() if times > 1}


class Replay:
    """The sends of one sender, given in the order of their ends; holds no more than a window's.

    Times are seconds. With `since`, what started earlier is not judged, for other limits may have
    held then; in a later send's gap and window it counts all the same.
    """

    def __init__(self, window: float, limit: int, since: float | None = None) -> None:
        self._window = window
        self._limit = limit
        self._since = since
        self._inside: deque[float] = deque()
        self._last_end: float | None = None
        self.sends = 0
        self.judged = 0
        # Equal to `least_gap` of all; where sends overlap, negative like that.
        self.least_gap: float | None = None
        self.most_in_window = 0
        # The least time in which one send more than the limit ended; None: no window held that.
        self.shortest: float | None = None

    def add(self, start: float, end: float) -> None:
        """Replay one send more, whose end is not before the last one's."""
        inside = self._inside
        while inside and inside[0] <= end - self._window:
            inside.popleft()
        inside.append(end)
        before, self._last_end = self._last_end, end
        self.sends += 1
        if self._since is not None and start < self._since:
            return
        self.judged += 1
        self.most_in_window = max(self.most_in_window, len(inside))
        if len(inside) > self._limit:
            span = end - inside[-1 - self._limit]
            self.shortest = span if self.shortest is None else min(self.shortest, span)
        if before is not None:
            gap = start - before
            self.least_gap = gap if self.least_gap is None else min(self.least_gap, gap)

    def overshoot(self, slack: float = 0.0) -> int:
        """Return by how many mails the limit was exceeded in some window.

        `slack`: by how much the time between two ends may be wrong; what it explains is none.
        """
        if self.shortest is None or self.shortest > self._window - slack:
            return 0
        return self.most_in_window - self._limit


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
    """How the copies of a job's mail go with its attempts."""

    lost: bool
    # Copies beyond the first; and those of them that no attempt in doubt explains.
    duplicates: int
    unexplained: int


def delivery_of(job: JobTrace, copies: int | None) -> Delivery:
    """Compare a job with the `copies` of it that the SMTP side saw; None: nobody looked there."""
    if copies is None:
        again = max(0, job.sent - 1)
        return Delivery(lost=False, duplicates=again, unexplained=again)
    # An open one may have been sent since PostgreSQL was read.
    allowed = job.sent + job.doubtful + (job.state not in FINAL_STATES)
    return Delivery(
        lost=job.sent > 0 and copies == 0,
        duplicates=max(0, copies - 1),
        # A second recorded send explains nothing: it is the fault itself.
        unexplained=max(0, copies - allowed, job.sent - 1),
    )
