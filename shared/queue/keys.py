"""The names of the keys in Redis, and how a job is written there."""

from __future__ import annotations

from typing import NamedTuple


class JobRef(NamedTuple):
    """A job and the number of one attempt at it: the unit that is claimed, sent and settled."""

    job_id: int
    attempt: int


def member_of(job: JobRef) -> str:
    """Return the sorted-set member of a job.

    Members with the same score sort as text, and jobs due at the same time are sent in the order of
    their ids. Ids have 19 digits (`shared.id_source`), except those of earlier releases, which are
    padded to twelve and sort before them. The attempt makes a claim a compare-and-swap: a stale
    member can be claimed, but PostgreSQL then refuses it.
    """
    return f"{job.job_id:012d}:{job.attempt}"


def job_of(member: str) -> JobRef:
    """Return the job of a member (the reverse of `member_of`)."""
    job_id, _, attempt = member.partition(":")
    return JobRef(int(job_id), int(attempt))


class ShardKeys:
    """The keys of one shard. The hash tag keeps them, and all of its senders, in one slot.

    `key_space` is the name of the stored settings that the data depends on (`shared.agreed`).
    """

    def __init__(self, shard: int, key_space: str = "") -> None:
        tag = f"{key_space}.{shard}" if key_space else str(shard)
        prefix = f"outbox:{{{tag}}}:"
        self.ready = prefix + "ready"
        self.generation = prefix + "generation"
        self.rebuild = prefix + "rebuild"
        self.wake = prefix + "wake"
        self.health = prefix + "health"
