"""What the queue's scripts are given and what they return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum, StrEnum
from typing import NamedTuple

from outbox_server.shared.queue.circuit_keys import RELAY
from outbox_server.shared.queue.keys import JobRef


class LimitUse(StrEnum):
    """What an ended claim means for the limits of its sender."""

    # Its body was begun: it takes an entry of the window, and the gap runs from its end.
    COUNTED = "COUNTED"
    # SMTP was tried and no body was begun: the gap runs from its end.
    BEGUN = "BEGUN"
    # SMTP was not tried.
    UNUSED = "UNUSED"


class Contact(StrEnum):
    """What an attempt says about the endpoint, as settle.lua reads it."""

    NONE = ""
    # It sent any reply.
    ANSWERED = "OK"
    # It accepted a mail.
    ACCEPTED = "SENT"
    # It replied that mail comes too fast.
    TOO_FAST = "RATE"
    # The connection failed.
    FAILED = "!"
    # Authentication failed.
    AUTH_FAILED = "?"


@dataclass(frozen=True, slots=True)
class Claim:
    """A job whose lease the caller has until it expires."""

    sender_id: int
    job: JobRef
    # Time since the earliest instant at which due time, gap and window allowed it.
    waited: timedelta
    # When its lease expires, in Unix ms of Redis' clock. It distinguishes this claim from another
    # claim of the same attempt, which is possible after a loss of Redis.
    lease_ms: int
    # When it was due, in Unix ms: its place in the head if the claim is not used.
    due_ms: int
    # The sender cools down, and this job is its probe.
    probe: bool = False
    # The limit that delayed it after it was due, as a name of WaitReason. Empty if none did.
    delayed_by: str = ""
    # The key of the user who owns the sender. Empty if the last load did not know it.
    user: str = ""
    # The life of the shard in which it was made.
    life: str = ""

    def seconds_since_due(self, lease: timedelta) -> float:
        """Return the time from when it was due until it was claimed, for one `lease`."""
        return (self.lease_ms - self.due_ms) / 1000 - lease.total_seconds()


@dataclass(frozen=True, slots=True)
class Claimed:
    """The result of a claim on one shard."""

    # The shard is incomplete, after a loss of Redis or a start with an old snapshot: rebuild it.
    # Loaded senders may send meanwhile.
    lost: bool = False
    claims: tuple[Claim, ...] = ()
    # Senders whose head must be loaded.
    loads: tuple[int, ...] = ()
    # Some senders wait because their user may have no more.
    parked: bool = False
    # Time until something may be claimed next. None means that nothing can be claimed until
    # something is added.
    next_look: timedelta | None = None
    # Redis was lost, and no dispatcher has begun the next life of the shard yet.
    provisional: bool = False


@dataclass(frozen=True, slots=True)
class Settlement:
    """How one claim ended."""

    sender_id: int
    job: JobRef
    use: LimitUse
    # Time since the end of the send, by the monotonic clock of the process that sent.
    age: timedelta = timedelta(0)
    # The job's next attempt, if it waits again, and when that is due (Unix ms).
    next_job: JobRef | None = None
    next_due_ms: int = 0
    # `lease_ms` of the claim. Used with UNUSED, so that no other claim's lease is released.
    lease_ms: int = 0
    # How the endpoint reacted.
    contact: Contact = Contact.NONE
    # Why the connection failed, and whether it did before MAIL, so that no mail can be the cause.
    # Used with FAILED and AUTH_FAILED.
    connection_error: str = ""
    before_mail: bool = False
    # The key of the sender's user, as in `Claim`.
    user: str = ""
    # Time from now until the sender's next probe may begin. Zero means that its cooldown is over,
    # None that the cooldown does not change.
    cooldown: timedelta | None = None
    # Host and port of the mail server, for people.
    server: str = ""
    # The code of the reply, if `connection_error` is a reply of the server.
    smtp_code: int | None = None


@dataclass(frozen=True, slots=True)
class NewJobs:
    """Jobs of one sender that were just committed, with the marker that requests their load."""

    # Each with its due time in Unix ms.
    jobs: Sequence[tuple[JobRef, int]]
    marker_id: int


class PastEnd(NamedTuple):
    """An attempt that ended within the window: the limiter's history."""

    job: JobRef
    age: timedelta
    counted: bool


class ActiveLease(NamedTuple):
    """A job that a dispatcher is sending."""

    job: JobRef
    left: timedelta


@dataclass(frozen=True, slots=True)
class Head:
    """A sender's settings and its first waiting jobs, as read from PostgreSQL."""

    sender_id: int
    hourly_limit: int
    gap: timedelta
    max_in_flight: int
    active: bool
    # In the order of (due, id), with the due time in Unix ms.
    jobs: tuple[tuple[JobRef, int], ...]
    # Whether more jobs wait behind the last of `jobs`.
    more: bool
    ends: tuple[PastEnd, ...] = ()
    leases: tuple[ActiveLease, ...] = field(default=())
    # The key of its user, which a claim counts by, and of its endpoint
    # (`shared.queue.circuit_keys`), and the sender's revision.
    user: str = ""
    # Whether the user has limits of its own, and so a `UserHead`.
    user_limited: bool = False
    endpoint: str = RELAY
    revision: int = 1
    # The current or next opening of its sending hours, in Unix ms. None means no sending hours.
    opening: tuple[int, int] | None = None
    # Time to the next probe of the sender's cooldown. None means that it does not cool down.
    cooldown: timedelta | None = None
    # When the sender's pause ends, or has ended, by itself, in Unix ms. 0 means that it has no such
    # pause.
    paused_until_ms: int = 0
    # Time until the head must be loaded again in any case. None means never.
    wake: timedelta | None = None


@dataclass(frozen=True, slots=True)
class UserHead:
    """The limits of a user, and the history of all its senders, as read from PostgreSQL.

    None means that the limit is that of all users.
    """

    user: str
    hourly_limit: int | None = None
    gap: timedelta | None = None
    ends: tuple[PastEnd, ...] = ()
    leases: tuple[ActiveLease, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadyJobs:
    """The jobs of a shard that may be sent now and wait only for a dispatcher.

    `complete` is False while the shard is rebuilt. `age` is the time since the limits allowed the
    oldest of them; zero if there are none.
    """

    complete: bool
    count: int
    age: timedelta


@dataclass(frozen=True, slots=True)
class UpcomingJobs:
    """Jobs of a shard that may be sent soon, one per sender. They are a hint and may be wrong.

    `more` means that there are others. `after` and `skip` say where the next call begins.
    """

    job_ids: tuple[int, ...] = ()
    more: bool = False
    after: int = 0
    skip: int = 0


def brings_history(epoch: str) -> bool:
    """Whether a load with this epoch must restore the sender's history, because Redis lost it."""
    return epoch.startswith("new:")


class RebuildEnd(IntEnum):
    """How a rebuild ended, with the numbers of finish_rebuild.lua. Only OVERTAKEN is false."""

    # Redis was lost again meanwhile.
    OVERTAKEN = 0
    # The shard is complete, and was before.
    STILL_COMPLETE = 1
    # The shard is complete, and was not before.
    RESTORED = 2
