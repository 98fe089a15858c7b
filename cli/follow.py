"""Follows a batch until all its jobs have ended."""

from __future__ import annotations

from outbox.v1.batch_pb2 import Batch
from outbox.v1.email_job_pb2 import EmailJobCounts
from outbox_client import CallError, Client

from outbox_server.cli.progress import JobProgress
from outbox_server.cli.terminal import note


def ended_count(counts: EmailJobCounts) -> int:
    """Return how many jobs are in a final state."""
    waits = ("scheduled_count", "sending_count")
    names = [field.name for field in counts.DESCRIPTOR.fields if field.name not in waits]
    return sum(getattr(counts, name) for name in names)


def remark_on(counts: EmailJobCounts) -> str:
    """Return the counts of jobs that ended without being sent, for people."""
    states = ("failed", "uncertain", "cancelled", "suppressed", "expired")
    return ", ".join(
        f"{count} {state}" for state in states if (count := getattr(counts, f"{state}_count"))
    )


def follow_to_end(client: Client, batch: Batch, user: str) -> Batch:
    """Show the batch's progress until every job has ended, and return its final state.

    Raises:
        CallError: the scheduler refused the call, or was unreachable for a minute.
    """
    accepted = batch
    title, noted = f"batch {batch.batch_id}", False

    def on_error(_: CallError) -> None:
        nonlocal noted
        if not noted:
            note("the scheduler does not answer; trying again")
        noted = True

    with JobProgress({title: batch.accepted_count}) as progress:
        for now in client.watch_batch(batch.batch_id, user, trouble=on_error):
            batch, noted = now, False
            progress.update(title, ended_count(batch.counts), remark_on(batch.counts))
    # WatchBatch leaves out the templates.
    for name in ("body", "html"):
        if accepted.HasField(name):
            setattr(batch, name, getattr(accepted, name))
    return batch
