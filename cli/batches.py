"""`outbox batches`: the commands of BatchService, except the upload (`outbox schedule`)."""

from __future__ import annotations

from typing import Annotated

import typer
from outbox.v1 import batch_service_pb2 as pb

from outbox_server.cli.change_options import GuardedChangeOptions
from outbox_server.cli.client import Server, connection, pages
from outbox_server.cli.follow import follow_to_end
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import Filtering, Paging, User
from outbox_server.cli.output import (
    Output,
    OutputFormat,
    print_json_line,
    show,
    show_list,
    to_document,
)

_COLUMNS = (
    "batch_id",
    "sender_id",
    "state",
    "accepted_count",
    "rejected_count",
    "counts.scheduled_count",
    "counts.sent_count",
    "counts.failed_count",
    "create_time",
    "subject",
)
REJECTION_COLUMNS = ("row_number", "column", "reason", "message")

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Show, watch and cancel batches."
)

BatchId = Annotated[str, typer.Argument(metavar="BATCH_ID")]


@app.command()
def get(
    batch_id: BatchId, user: User = "", server: Server = None, output: Output = OutputFormat.TABLE
) -> None:
    """Show one batch with exact counts."""
    with connection("scheduler", server) as client:
        batch = client.batches.GetBatch(pb.GetBatchRequest(batch_id=batch_id, user_id=user))
    show(batch, output)


@app.command()
def watch(
    batch_id: BatchId, user: User = "", server: Server = None, output: Output = OutputFormat.TABLE
) -> None:
    """Follow a batch until all its jobs have ended; `-o json` prints a line per change."""
    with connection("scheduler", server) as client:
        if output is OutputFormat.JSON:
            for batch in client.watch_batch(batch_id, user):
                print_json_line(to_document(batch))
            return
        batch = client.batches.GetBatch(pb.GetBatchRequest(batch_id=batch_id, user_id=user))
        batch = follow_to_end(client, batch, user)
    show(batch, output)


@app.command(name="list")
@with_option_groups
def list_(
    *,
    user: User = "",
    sender: Annotated[
        str, typer.Option("--sender", metavar="ID", help="Only batches of this sender.")
    ] = "",
    filtering: Filtering,
    paging: Paging,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List batches, newest first, or in another order.

    $ outbox batches list --user demo --filter "state = ACTIVE"
    """
    request = pb.ListBatchesRequest(
        user_id=user, sender_id=sender, filter=filtering.filter, order_by=filtering.order_by
    )
    with connection("scheduler", server) as client:
        page = pages(client.batches.ListBatches, request, "batches", paging)
    show_list(page, "batches", _COLUMNS, output, what="batches")


@app.command()
@with_option_groups
def rejections(
    batch_id: BatchId,
    *,
    user: User = "",
    paging: Paging,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List the rejected rows of a batch, with the reasons."""
    request = pb.ListRejectionsRequest(batch_id=batch_id, user_id=user)
    with connection("scheduler", server) as client:
        page = pages(client.batches.ListRejections, request, "rejections", paging)
    show_list(page, "rejections", REJECTION_COLUMNS, output, what="rejections")


@app.command()
@with_option_groups
def cancel(
    batch_id: BatchId,
    *,
    user: User = "",
    change: GuardedChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Cancel all waiting jobs of a batch, and count those that it was too late to cancel."""
    request = change.of(pb.CancelBatchRequest(batch_id=batch_id, user_id=user))
    with connection("scheduler", server) as client:
        answer = client.batches.CancelBatch(request)
    show(answer, output)
