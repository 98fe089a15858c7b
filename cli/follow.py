"""Following a batch until nothing of it waits."""

from __future__ import annotations

from outbox.v1.batch_pb2 import Batch
from outbox.v1.email_job_pb2 import EmailJobCounts
from outbox_client import CallError, Client

from outbox_server.cli.output import note
from outbox_server.cli.progress import JobProgress


def ended_count(counts: EmailJobCounts) -> int:
    """Return how many jobs are in a final state."""
    waits = ("scheduled_count", "sending_count")
    names = [field.name for field in counts.DESCRIPTOR.fields if field.name not in waits]
    return sum(getattr(counts, name) for name in names)


def remark_on(counts: EmailJobCounts) -> str:
    """Return what is not sent and not waiting either, for people."""
    states = ("failed", "uncertain", "cancelled", "suppressed", "expired")
    return ", ".join(
        f"{count} {state}" for state in states if (count := getattr(counts, f"{state}_count"))
    )


def follow_to_end(client: Client, batch: Batch, user: str) -> Batch:
    """Show the batch's progress until every job has ended, and return it as it is then.

    Raises:
        CallError: the scheduler refuses, or was away for a minute.
    """
    accepted = batch
    title, noted = f"batch {batch.batch_id}", False

    def away(_: CallError) -> None:
        nonlocal noted
        if not noted:
            note("the scheduler does not answer; asking again")
        noted = True

    with JobProgress({title: batch.accepted_count}) as progress:
        for now in client.watch_batch(batch.batch_id, user, trouble=away):
            batch, noted = now, False
            progress.update(title, ended_count(batch.counts), remark_on(batch.counts))
    # What is watched comes without its texts.
    for name in ("body", "html"):
        if accepted.HasField(name):
            setattr(batch, name, getattr(accepted, name))
    return batch
