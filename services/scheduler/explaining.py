"""Explains why a job has not been sent yet: names the one limit that delays it now. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum
from typing import Final

from outbox_server.shared.cooldowns.record import CooldownRecord
from outbox_server.shared.smtp.reply_text import describe_reply
from outbox_server.shared.states import AttemptOutcome, JobState, ReplyClass

# At most this many jobs before a job are counted.
MOST_AHEAD = 1_000_000


class WaitReason(IntEnum):
    """The reason why a job waits, with the numbers of `outbox.v1`.

    The limits of a sender are implemented in limits.lua, simulation.py, replay.py and
    queue_model.py: sender_limits.py has the list.
    """

    UNSPECIFIED = 0
    NOT_DUE = 1
    RETRY = 2
    MIN_GAP = 3  # Limit.GAP, Limit.PACE
    HOURLY_LIMIT = 4  # Limit.WINDOW
    SENDER_PAUSED = 5  # Limit.PAUSE
    SENDING_HOURS = 6  # Limit.SENDING_HOURS
    ENDPOINT_DOWN = 7  # Limit.CIRCUIT
    QUEUE = 8  # Limit.IN_FLIGHT, or other jobs that come first
    DISPATCHER = 9
    COOLDOWN = 10  # Limit.COOLDOWN
    DEFERRED = 11
    SHARE = 12
    USER_HOURLY_LIMIT = 13  # Limit.USER_WINDOW
    USER_GAP = 14  # Limit.USER_GAP
    HELD = 15
    BATCH_PAUSED = 16


# A dispatcher marks a claimed job at once. A job that it has had for longer waits for a permit.
_CLAIM_WAITS_AFTER: Final = timedelta(seconds=1)

# Why an attempt with a reply of `shared.states.NOT_COUNTED` does not count as a failure: a clause.
WHY_NOT_COUNTED: Final = {
    ReplyClass.ACCOUNT: "the sender's account was refused",
    ReplyClass.CONNECTIONS: "the mail server had too many connections",
    ReplyClass.RATE: "mail came too fast for the mail server",
    ReplyClass.AUTH: "the mail server refused the sign-in",
}


@dataclass(frozen=True, slots=True)
class OpenCircuit:
    """An open circuit of the sender or of its endpoint, after several failures in a row."""

    since: datetime
    next_probe: datetime
    reason: str


@dataclass(frozen=True, slots=True)
class LastAttempt:
    """The last attempt at a job that has ended. `reply_class` is None if there was no reply."""

    outcome: AttemptOutcome
    message: str | None
    smtp_code: int | None = None
    enhanced_code: str | None = None
    reply_class: ReplyClass | None = None

    @property
    def reply(self) -> str:
        """The reply, or the error, as one line."""
        return describe_reply(self.smtp_code, self.enhanced_code, self.message or "")


@dataclass(frozen=True, slots=True)
class UserSituation:
    """The state of the limits that a user has for all its senders together."""

    # 0 means that only the gap is limited.
    hourly_limit: int
    has_gap: bool
    gap_left: timedelta
    window_left: timedelta
    in_flight: int


@dataclass(frozen=True, slots=True)
class BatchPause:
    """Why nothing of the job's batch is sent now. `until` is None if only a call ends the pause."""

    until: datetime | None = None
    # Many of its jobs are being changed.
    respreading: bool = False


@dataclass(frozen=True, slots=True)
class Situation:
    """The state of a waiting job and of its sender at `now`."""

    now: datetime
    due: datetime
    # All attempts so far.
    attempts: int
    # Attempts that count as failures.
    failures: int
    sender_active: bool
    # The number of waiting jobs of the sender that come first.
    ahead: int
    in_flight: int
    # How long the gap and the window still delay the sender. Zero or less means not at all.
    gap_left: timedelta
    window_left: timedelta
    hourly_limit: int
    # How long ago a dispatcher claimed the job. None means that no dispatcher has it.
    claimed_for: timedelta | None = None
    # The sender waits because its user may have no more of a dispatcher's slots.
    parked: bool = False
    # The same for the user's limits on all its senders together. None means no such limits.
    user: UserSituation | None = None
    # When the sending hours begin again. None means that mail may be sent now.
    opens: datetime | None = None
    circuit: OpenCircuit | None = None
    cooldown: CooldownRecord | None = None
    # None means that no attempt has ended.
    last: LastAttempt | None = None
    # Until when a deferred job is tried. None means that the server did not defer it.
    deferred_until: datetime | None = None
    # The installation is held, and the job was not released.
    held: bool = False
    # When the sender's pause ends by itself. None means that only a call ends it, or that it is not
    # paused.
    sender_resumes: datetime | None = None
    batch: BatchPause | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """What delays a job, until when (None if nobody knows), and both in a sentence."""

    reason: WaitReason
    until: datetime | None
    text: str


_FINAL = {
    JobState.SENDING: "A dispatcher is sending it now.",
    JobState.SENT: "It was sent.",
    JobState.FAILED: "It failed permanently; RetryEmailJobs schedules it again.",
    JobState.UNCERTAIN: "Nobody knows whether it arrived; call ResolveEmailJob to decide.",
    JobState.CANCELLED: "It was cancelled and will never be sent.",
    JobState.SUPPRESSED: "Its recipient is suppressed: it will never be sent.",
    JobState.EXPIRED: "It expired and will never be sent.",
}


_SHARE: Final = Explanation(
    WaitReason.SHARE,
    None,
    "It may be sent now, but its user, or its mail server, has its share of the dispatcher's "
    "slots; it is sent when another mail of the user has ended.",
)


_HELD: Final = Explanation(
    WaitReason.HELD,
    None,
    "The installation is held, as after a restore of its database; an operator releases or cancels "
    "what waits.",
)


def explain_state(state: JobState) -> Explanation:
    """Explain a job that does not wait."""
    return Explanation(WaitReason.UNSPECIFIED, None, _FINAL[state])


def explain(it: Situation) -> Explanation:
    """Explain a job that waits.

    Several limits may delay it. The first in this order is named: a hold, a pause, the job's due
    time, limits on all mail of the sender, other jobs that come first, the sender's window and gap.
    """
    if it.held:
        return _HELD
    pauses = list(_pauses(it))
    if pauses:
        # Nothing is sent before the last of them ends, so that one is reported. If neither has an
        # end, the sender's pause is reported.
        return max(pauses, key=lambda pause: (pause.until is None, pause.until or it.now))
    if it.due > it.now:
        if it.attempts:
            return _explain_retry(it)
        return Explanation(WaitReason.NOT_DUE, it.due, f"It is due at {_at(it.due)}.")
    return _explain_due(it)


def _pauses(it: Situation) -> Iterator[Explanation]:
    if not it.sender_active:
        until = it.sender_resumes
        end = "ResumeSender ends the pause" if until is None else f"the pause ends at {_at(until)}"
        yield Explanation(WaitReason.SENDER_PAUSED, until, f"Its sender is paused; {end}.")
    if it.batch is not None:
        yield _explain_batch_pause(it.batch)


def _explain_batch_pause(pause: BatchPause) -> Explanation:
    reason = WaitReason.BATCH_PAUSED
    if pause.respreading:
        text = "Many jobs of its batch are being changed, which takes seconds."
        return Explanation(reason, None, text)
    until = pause.until
    end = "ResumeBatch ends the pause" if until is None else f"the pause ends at {_at(until)}"
    return Explanation(reason, until, f"Its batch is paused; {end}.")


def _explain_retry(it: Situation) -> Explanation:
    following = f"attempt {it.attempts + 1} is at {_at(it.due)}"
    if it.deferred_until is not None and (
        it.last is None or it.last.reply_class is ReplyClass.DEFERRED
    ):
        reply = "" if it.last is None else f" ({it.last.reply})"
        return Explanation(
            WaitReason.DEFERRED,
            it.due,
            f"The mail server asked for this mail later{reply}; {following}, and it is tried until "
            f"{_at(it.deferred_until)}.",
        )
    return Explanation(WaitReason.RETRY, it.due, f"{_describe_last_attempt(it)}; {following}.")


def _describe_last_attempt(it: Situation) -> str:
    last = it.last
    if last is None:
        return f"Attempt {it.attempts} failed"
    why = None
    if last.reply_class in WHY_NOT_COUNTED:
        why = WHY_NOT_COUNTED[last.reply_class]
    elif last.outcome is AttemptOutcome.CONNECTION_FAILURE:
        if last.reply_class is not None:
            why = "the mail server refused the session"
        elif not it.failures:
            why = "no session with the mail server could be opened"
        else:
            # Such an attempt counts only if MAIL was sent, which is not stored. So the sentence
            # says how many attempts count.
            return (
                f"The connection of attempt {it.attempts} failed ({last.reply}); attempts that "
                f"count as failures so far: {it.failures}"
            )
    if why is None:
        return f"Attempt {it.attempts} failed"
    return f"Attempt {it.attempts} does not count as a failure, since {why} ({last.reply})"


def _explain_due(it: Situation) -> Explanation:
    holds = list(_holds(it))
    if holds:
        # Nothing is sent before the last of them ends, so that one is reported.
        return max(holds, key=lambda hold: hold[0])[1]
    if it.claimed_for is not None and it.claimed_for >= _CLAIM_WAITS_AFTER:
        # The limits allowed the job, and its lease already counts against them.
        return _SHARE
    if it.cooldown is not None and (it.ahead or it.in_flight):
        text = f"{it.cooldown.refusal}; another mail goes first as a probe, and its reply decides."
        return Explanation(WaitReason.COOLDOWN, None, text)
    if it.ahead:
        others = "1 other job" if it.ahead == 1 else f"{it.ahead:,} other jobs"
        if it.ahead >= MOST_AHEAD:
            others = f"at least {others}"
        return Explanation(
            WaitReason.QUEUE, None, f"{others} of its sender come first.".capitalize()
        )
    return _explain_first(it)


def _holds(it: Situation) -> Iterator[tuple[datetime, Explanation]]:
    """Yield each limit that delays all mail of the sender, with the time when it ends."""
    if it.cooldown is not None and it.cooldown.next_probe_at > it.now:
        until = it.cooldown.next_probe_at
        yield until, Explanation(WaitReason.COOLDOWN, until, it.cooldown.describe(it.now))
    if it.circuit is not None:
        until = it.circuit.next_probe
        text = (
            f"The mail server has been failing since {_at(it.circuit.since)} "
            f"({it.circuit.reason}); the next probe is at {_at(until)}."
        )
        yield until, Explanation(WaitReason.ENDPOINT_DOWN, until, text)
    if it.opens is not None:
        text = f"It is outside the sender's sending hours until {_at(it.opens)}."
        yield it.opens, Explanation(WaitReason.SENDING_HOURS, it.opens, text)


def _explain_first(it: Situation) -> Explanation:
    zero = timedelta(0)
    by_user = None if it.user is None else _explain_user(it, it.user)
    if by_user is not None:
        return by_user
    if it.window_left > zero and it.window_left >= it.gap_left:
        until = it.now + it.window_left
        text = f"The sender's limit of {it.hourly_limit} mails is used up until {_at(until)}."
        return Explanation(WaitReason.HOURLY_LIMIT, until, text)
    if it.gap_left > zero:
        until = it.now + it.gap_left
        text = f"The gap after the sender's last send ends at {_at(until)}."
        return Explanation(WaitReason.MIN_GAP, until, text)
    if it.in_flight:
        text = "Another mail of its sender is being sent."
        return Explanation(WaitReason.QUEUE, None, text)
    if it.parked:
        return _SHARE
    text = "It may be sent now, as soon as a dispatcher is free."
    return Explanation(WaitReason.DISPATCHER, it.now, text)


def _explain_user(it: Situation, user: UserSituation) -> Explanation | None:
    """Explain a wait for the limits of the user; None if the sender's own limits last longer."""
    own = max(it.window_left, it.gap_left, timedelta(0))
    if own == timedelta(0) and user.has_gap and user.in_flight and not it.in_flight:
        text = "Another mail of its user is being sent, and the user's gap allows one at a time."
        return Explanation(WaitReason.USER_GAP, None, text)
    if max(user.window_left, user.gap_left) <= own:
        return None
    if user.window_left >= user.gap_left:
        until = it.now + user.window_left
        text = (
            f"The limit of {user.hourly_limit} mails that its user has for all senders together is "
            f"used up until {_at(until)}; then they take turns."
        )
        return Explanation(WaitReason.USER_HOURLY_LIMIT, until, text)
    until = it.now + user.gap_left
    text = (
        f"The gap after the last send of its user, by any sender, ends at {_at(until)}; then its "
        "senders take turns."
    )
    return Explanation(WaitReason.USER_GAP, until, text)


def _at(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"
