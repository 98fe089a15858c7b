"""Tells from the counts of a batch whether it has jobs in some states.

Without this, listing failed jobs would read all jobs that were ever sent.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from sqlalchemy import ColumnElement, func, select

from outbox_server.shared.database.models import (
    Batch,
    BatchCancellation,
    BatchCount,
    CountDelta,
    JobChange,
)
from outbox_server.shared.states import JobState


def has_counted(states: AbstractSet[JobState]) -> ColumnElement[bool]:
    """Return the condition that a batch has jobs in one of these states, by its counts.

    Jobs that are being sent are counted as SCHEDULED. So are the waiting jobs of a cancelled batch
    until their rows are updated. Subqueries about all batches are evaluated once per statement:
    there are deltas of few batches, because they are folded after about a second.
    """
    sending = JobState.SENDING
    counted = sorted({int(JobState.SCHEDULED if each is sending else each) for each in states})
    recent = select(CountDelta.batch_id).where(CountDelta.state.in_(counted))
    folded = select(BatchCount.batch_id).where(
        BatchCount.batch_id == Batch.id, BatchCount.state.in_(counted), BatchCount.n > 0
    )
    parts = (
        select(BatchCount.batch_id, BatchCount.state, BatchCount.n)
        .where(BatchCount.batch_id.in_(recent), BatchCount.state.in_(counted))
        .union_all(
            select(CountDelta.batch_id, CountDelta.state, CountDelta.n).where(
                CountDelta.state.in_(counted)
            )
        )
        .subquery("parts")
    )
    summed = (
        select(parts.c.batch_id)
        .group_by(parts.c.batch_id, parts.c.state)
        .having(func.sum(parts.c.n) > 0)
    )
    # LIMIT keeps the planner from reading the counts of all batches into a hash table.
    counts = folded.limit(1).correlate(Batch).scalar_subquery().is_not(None)
    unchanged = counts & Batch.id.not_in(recent)
    return unchanged | Batch.id.in_(summed)


def may_have(states: AbstractSet[JobState]) -> ColumnElement[bool]:
    """Return the condition that a batch may have jobs in one of these states."""
    found = has_counted(states)
    if JobState.CANCELLED in states:
        found |= Batch.id.in_(select(BatchCancellation.batch_id))
        found |= Batch.id.in_(select(JobChange.batch_id))
    return found
