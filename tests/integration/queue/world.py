"""The surroundings of the queue in memory: PostgreSQL's rows, and the times of all sends.

This module has no I/O. The rows change as the services' statements change them. The limits are
checked against the sends. Times are in us since 1970, except due times (Unix ms).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

from outbox_server.shared.queue.keys import JobRef, member_of
from outbox_server.shared.queue.records import ActiveLease, Head, PastEnd, UserHead
from outbox_server.shared.states import JobState
from tests.integration.queue_state import HeadModel, UserHeadModel

# Small, so that a head is used up soon.
HEAD_SIZE = 4
# The endpoints of each user: the relay and another.
ENDPOINTS = {"a": ("relay:a", "own"), "b": ("relay:b", "other")}


@dataclass
class SenderRow:
    limit: int
    gap: int
    flight: int
    active: bool
    user: str = "a"
    # Whether it has an SMTP endpoint of its own.
    own: bool = False
    revision: int = 1

    @property
    def endpoint(self) -> str:
        return ENDPOINTS[self.user][self.own]


@dataclass
class ModelledJob:
    job_id: int
    sender_id: int
    due: int
    state: JobState = JobState.SCHEDULED
    attempt: int = 0
    lease_until: int = 0


@dataclass(frozen=True)
class ModelledAttempt:
    sender_id: int
    job: JobRef
    ended: int
    counted: bool


@dataclass
class Send:
    """One transfer to SMTP, from its claim."""

    job_id: int
    claimed: int
    deadline: int
    gap: int
    # The gap of its user.
    user_gap: int = 0
    # None while it is under way; it ends at the deadline at the latest.
    ended: int | None = None
    counted: bool = True

    @property
    def last_end(self) -> int:
        return self.deadline if self.ended is None else self.ended


@dataclass
class ModelledInstallation:
    window: int
    lease: int
    senders: dict[int, SenderRow] = field(default_factory=dict)
    jobs: dict[int, ModelledJob] = field(default_factory=dict)
    attempts: list[ModelledAttempt] = field(default_factory=list)
    # Loads needed if the committing process dies: number and sender.
    markers: dict[int, int] = field(default_factory=dict)
    marker_ids: Iterator[int] = field(default_factory=itertools.count)
    sends: dict[int, list[Send]] = field(default_factory=dict)
    # The limits that were set for users: sends in a window, and gap. None means those of all users.
    users: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    # The earliest time of the next probe, for each sender in a cooldown.
    cooldowns: dict[int, int] = field(default_factory=dict)
    # The life of Redis that is valid, and the number of the last one.
    life: str = ""
    lives: Iterator[int] = field(default_factory=itertools.count)

    # PostgreSQL ------------------------------------------------------------------------------

    def add_jobs(self, sender_id: int, dues: list[int]) -> list[tuple[JobRef, int]]:
        """Add jobs; return the first attempt at each, with its due time."""
        added = []
        for due in dues:
            job_id = len(self.jobs) + 1
            self.jobs[job_id] = ModelledJob(job_id, sender_id, due)
            added.append((JobRef(job_id, 1), due))
        return added

    def mark_stale(self, sender_id: int) -> int:
        number = next(self.marker_ids)
        self.markers[number] = sender_id
        return number

    def in_state(self, state: JobState, sender_id: int | None = None) -> Iterator[ModelledJob]:
        for job in self.jobs.values():
            if job.state is state and sender_id in (None, job.sender_id):
                yield job

    def read_head(self, sender_id: int, now: int, *, fresh: bool) -> tuple[Head, HeadModel]:
        """Return the result of a load's reads, for the queue and for its model."""
        row = self.senders[sender_id]
        waiting = sorted(
            self.in_state(JobState.SCHEDULED, sender_id), key=lambda job: (job.due, job.job_id)
        )
        head = tuple((JobRef(j.job_id, j.attempt + 1), j.due) for j in waiting[:HEAD_SIZE])
        more = len(waiting) > HEAD_SIZE
        ends, leases = self._history([sender_id] if fresh else [], now)
        probe_at = self.cooldowns.get(sender_id)
        left = None if probe_at is None else (probe_at - now) // 1000
        return (
            Head(
                sender_id,
                row.limit,
                timedelta(milliseconds=row.gap),
                row.flight,
                row.active,
                head,
                more,
                tuple(PastEnd(job, timedelta(milliseconds=age), c) for job, age, c in ends),
                tuple(ActiveLease(job, timedelta(milliseconds=left)) for job, left in leases),
                user=row.user,
                user_limited=any(self.users.get(row.user, ())),
                endpoint=row.endpoint,
                revision=row.revision,
                cooldown=None if left is None else timedelta(milliseconds=left),
            ),
            HeadModel(
                row.limit,
                row.gap,
                row.flight,
                row.active,
                row.endpoint,
                row.revision,
                row.user,
                any(self.users.get(row.user, ())),
                [(member_of(job), due) for job, due in head],
                more,
                # The end of an expired lease may lie in the future; its age is 0.
                [(member_of(job), max(0, age), c) for job, age, c in ends],
                [(member_of(job), left) for job, left in leases],
                0 if left is None else max(1, left),
            ),
        )

    def _history(
        self, sender_ids: list[int], now: int
    ) -> tuple[list[tuple[JobRef, int, bool]], list[tuple[JobRef, int]]]:
        """Return the ends in the window and the leases of these senders."""
        ends = [
            (a.job, (now - a.ended) // 1000, a.counted)
            for a in self.attempts
            if a.sender_id in sender_ids and now - a.ended < self.window * 1000
        ]
        leases = [
            (JobRef(j.job_id, j.attempt), max(0, -((now - j.lease_until) // 1000)))
            for j in self.in_state(JobState.SENDING)
            if j.sender_id in sender_ids
        ]
        return ends, leases

    def senders_of(self, user: str) -> list[int]:
        return [sender_id for sender_id, row in self.senders.items() if row.user == user]

    def read_user(self, user: str, now: int, *, fresh: bool) -> tuple[UserHead, UserHeadModel]:
        """Return what a load of a user's limits reads, for the queue and for its model."""
        limit, gap = self.users.get(user, (None, None))
        ends, leases = self._history(self.senders_of(user) if fresh else [], now)
        return (
            UserHead(
                user,
                limit,
                None if gap is None else timedelta(milliseconds=gap),
                tuple(PastEnd(job, timedelta(milliseconds=age), c) for job, age, c in ends),
                tuple(ActiveLease(job, timedelta(milliseconds=left)) for job, left in leases),
            ),
            UserHeadModel(
                limit,
                gap,
                [(member_of(job), max(0, age), c) for job, age, c in ends],
                [(member_of(job), left) for job, left in leases],
            ),
        )

    def begin_life(self) -> str:
        """Store a new valid life, and return it."""
        self.life = f"life {next(self.lives)}"
        return self.life

    def mark(self, job: JobRef, now: int) -> bool:
        """Mark a job that was claimed in the valid life."""
        row = self.jobs[job.job_id]
        if (
            row.state is not JobState.SCHEDULED
            or row.attempt != job.attempt - 1
            or not self.senders[row.sender_id].active
        ):
            return False
        # After these: a second claim of a job that was sent meanwhile may be early for its retry.
        assert row.due * 1000 <= now, "claimed before it was due"
        row.state, row.attempt, row.lease_until = JobState.SENDING, job.attempt, now + self.lease
        return True

    def renew(self, job: JobRef, now: int) -> int | None:
        """Move the end of a lease and return it; None if another process holds the job."""
        row = self.jobs[job.job_id]
        if not self._holds(job):
            return None
        row.lease_until = now + self.lease
        return row.lease_until

    def give_back(self, job: JobRef, lease_until: int) -> bool:
        row = self.jobs[job.job_id]
        if not self._holds(job) or row.lease_until != lease_until:
            return False
        row.state, row.attempt = JobState.SCHEDULED, row.attempt - 1
        return True

    def settle(self, job: JobRef, ended: int, *, counted: bool, retry_at: int | None) -> bool:
        row = self.jobs[job.job_id]
        if not self._holds(job):
            return False
        self.attempts.append(ModelledAttempt(row.sender_id, job, ended, counted))
        if retry_at is None:
            row.state = JobState.SENT
        else:
            row.state, row.due = JobState.SCHEDULED, retry_at
        return True

    def recover(self, now: int) -> set[int]:
        """End the attempts whose lease expired; return their senders."""
        concerned = set()
        for row in self.in_state(JobState.SENDING):
            if row.lease_until < now:
                row.state = JobState.SCHEDULED
                job = JobRef(row.job_id, row.attempt)
                self.attempts.append(ModelledAttempt(row.sender_id, job, row.lease_until, True))
                concerned.add(row.sender_id)
        return concerned

    def _holds(self, job: JobRef) -> bool:
        row = self.jobs[job.job_id]
        return row.state is JobState.SENDING and row.attempt == job.attempt

    # Sends of another server -----------------------------------------------------------------

    def send_elsewhere(self, sender_id: int, now: int, everyone: tuple[int, int]) -> None:
        """Send the next job of a sender at once, if its limits allow that.

        The dispatchers of another Redis do this while theirs is the valid one.
        """
        row = self.senders[sender_id]
        limit, gap = self.users.get(row.user, (None, None))
        user_limit = (everyone[0] if limit is None else limit) or float("inf")
        user_gap = everyone[1] if gap is None else gap
        jobs = (
            job for job in self.in_state(JobState.SCHEDULED, sender_id) if job.due * 1000 <= now
        )
        job = min(jobs, key=lambda one: (one.due, one.job_id), default=None)
        own, of_user = [sender_id], self.senders_of(row.user)
        if job is None or not row.active:
            return
        if not self._allows(own, now, row.limit, row.gap):
            return
        if not self._allows(of_user, now, user_limit, user_gap):
            return
        ref = JobRef(job.job_id, job.attempt + 1)
        assert self.mark(ref, now)
        send = Send(job.job_id, now, now + self.lease, row.gap, user_gap)
        self.begin_send(sender_id, send, now, row.limit, user_limit)
        send.ended = now
        assert self.settle(ref, now, counted=True, retry_at=None)

    def _allows(self, senders: list[int], now: int, limit: float, gap: int) -> bool:
        """Whether the history in PostgreSQL allows one more send now."""
        leases = [job for s in senders for job in self.in_state(JobState.SENDING, s)]
        ends = [one for one in self.attempts if one.sender_id in senders]
        since = now - self.window * 1000
        used = len(leases) + sum(one.counted and one.ended > since for one in ends)
        last = max((one.ended for one in ends), default=-gap * 1000)
        return used < limit and now - last >= gap * 1000 and not (gap and leases)

    # Sends that took place -------------------------------------------------------------------

    def begin_send(
        self, sender_id: int, send: Send, now: int, limit: int, user_limit: float
    ) -> None:
        """Record the start of a send, and check the promises.

        `limit` and `user_limit` are the highest limits that applied since the claim.
        """
        self._check_user(self.senders[sender_id].user, send, now, user_limit)
        others = self.sends.setdefault(sender_id, [])
        for other in others:
            if other.claimed <= send.claimed and send.gap:
                assert send.claimed - other.last_end >= send.gap * 1000, "the gap is too short"
            if other.job_id == send.job_id:
                assert other.last_end <= now, "two send the same job"
        since = now - self.window * 1000
        used = sum(other.counted and other.last_end > since for other in others)
        assert used < limit, "the window holds more than the limit"
        others.append(send)

    def _check_user(self, user: str, send: Send, now: int, limit: float) -> None:
        others = [one for s in self.senders_of(user) for one in self.sends.get(s, ())]
        for other in others:
            if other.claimed <= send.claimed and send.user_gap:
                apart = send.claimed - other.last_end
                assert apart >= send.user_gap * 1000, "the gap of the user is too short"
        since = now - self.window * 1000
        used = sum(other.counted and other.last_end > since for other in others)
        assert used < limit, "the window holds more than the limit of the user"
