"""Why a job was not sent yet: the one thing that binds now. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum

from shared.states import JobState

# Jobs before one that are counted.
MOST_AHEAD = 1_000_000


class WaitReason(IntEnum):
    """What a job waits for; the numbers are those of `outbox.v1`."""

    UNSPECIFIED = 0
    NOT_DUE = 1
    RETRY = 2
    MIN_GAP = 3
    HOURLY_LIMIT = 4
    SENDER_PAUSED = 5
    SENDING_HOURS = 6
    ENDPOINT_DOWN = 7
    QUEUE = 8
    DISPATCHER = 9


@dataclass(frozen=True, slots=True)
class OpenCircuit:
    """The endpoint, or the sender at it, failed several times in a row."""

    since: datetime
    next_probe: datetime
    reason: str


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known of a waiting job, of the moment `now`."""

    now: datetime
    due: datetime
    # Attempts that were begun.
    attempts: int
    sender_active: bool
    # Other jobs of the sender that wait and come first.
    ahead: int
    in_flight: int
    # Not above zero: it is over.
    gap_left: timedelta
    window_left: timedelta
    hourly_limit: int
    # When the sending hours begin again; None: it is within them.
    opens: datetime | None = None
    circuit: OpenCircuit | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """What binds, until when (None: no one can say), and both in a sentence."""

    reason: WaitReason
    until: datetime | None
    text: str


_FINAL = {
    JobState.SENDING: "A dispatcher is sending it now.",
    JobState.SENT: "It was sent.",
    JobState.FAILED: "It failed for good; RetryEmailJobs takes it back.",
    JobState.UNCERTAIN: "Nobody knows whether it arrived; ResolveUncertain decides.",
    JobState.CANCELLED: "It was cancelled and will never be sent.",
    JobState.SUPPRESSED: "Its recipient is suppressed: it will never be sent.",
    JobState.EXPIRED: "It expired and will never be sent.",
}


def explain_state(state: JobState) -> Explanation:
    """Explain a job that does not wait."""
    return Explanation(WaitReason.UNSPECIFIED, None, _FINAL[state])


def explain(it: Situation) -> Explanation:
    """Explain a job that waits: of all that holds it, what is farthest from itself."""
    if not it.sender_active:
        return Explanation(
            WaitReason.SENDER_PAUSED, None, "Its sender is paused: ResumeSender lets it go on."
        )
    if it.due > it.now:
        if it.attempts:
            text = f"Attempt {it.attempts} failed; attempt {it.attempts + 1} is at {_at(it.due)}."
            return Explanation(WaitReason.RETRY, it.due, text)
        return Explanation(WaitReason.NOT_DUE, it.due, f"It is due at {_at(it.due)}.")
    return _explain_due(it)


def _explain_due(it: Situation) -> Explanation:
    if it.circuit is not None:
        return Explanation(
            WaitReason.ENDPOINT_DOWN,
            it.circuit.next_probe,
            f"The mail server fails since {_at(it.circuit.since)} ({it.circuit.reason}); it is "
            f"probed again at {_at(it.circuit.next_probe)}.",
        )
    if it.opens is not None:
        text = f"It is outside the sender's sending hours until {_at(it.opens)}."
        return Explanation(WaitReason.SENDING_HOURS, it.opens, text)
    if it.ahead:
        others = "1 other job" if it.ahead == 1 else f"{it.ahead:,} other jobs"
        if it.ahead >= MOST_AHEAD:
            others = f"at least {others}"
        return Explanation(
            WaitReason.QUEUE, None, f"{others} of its sender come first.".capitalize()
        )
    return _explain_first(it)


def _explain_first(it: Situation) -> Explanation:
    zero = timedelta(0)
    if it.window_left > zero and it.window_left >= it.gap_left:
        until = it.now + it.window_left
        text = f"The sender's limit of {it.hourly_limit} mails is used up until {_at(until)}."
        return Explanation(WaitReason.HOURLY_LIMIT, until, text)
    if it.gap_left > zero:
        until = it.now + it.gap_left
        text = f"The gap after the sender's last send is over at {_at(until)}."
        return Explanation(WaitReason.MIN_GAP, until, text)
    if it.in_flight:
        text = "Another mail of its sender is being sent."
        return Explanation(WaitReason.QUEUE, None, text)
    text = "It may be sent now, as soon as a dispatcher is free."
    return Explanation(WaitReason.DISPATCHER, it.now, text)


def _at(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"
