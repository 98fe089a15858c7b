"""`outbox batches`: the commands of BatchService, except the upload (`outbox schedule`)."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1 import batch_service_pb2 as pb
from outbox.v1.batch_pb2 import Batch

from outbox_server.cli.change_options import GuardedChangeOptions
from outbox_server.cli.client import Server, connection, pages
from outbox_server.cli.follow import follow_to_end
from outbox_server.cli.mail_options import TemplateOptions, read_headers
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import (
    Filtering,
    Paging,
    Until,
    User,
    read_duration,
    read_time,
    to_duration,
    to_timestamp,
)
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
    no_args_is_help=True,
    add_completion=False,
    help="Show, watch, pause, change and cancel batches.",
)

BatchId = Annotated[str, typer.Argument(metavar="BATCH_ID", help="Id from `outbox batches list`.")]


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

    $ outbox batches list --user acme --filter "state = ACTIVE"
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
    filtering: Filtering,
    paging: Paging,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List the rejected rows of a batch, with the reasons."""
    request = pb.ListRejectionsRequest(
        batch_id=batch_id, user_id=user, filter=filtering.filter, order_by=filtering.order_by
    )
    with connection("scheduler", server) as client:
        page = pages(client.batches.ListRejections, request, "rejections", paging)
    show_list(page, "rejections", REJECTION_COLUMNS, output, what="rejections")


@app.command()
@with_option_groups
def pause(
    batch_id: BatchId,
    *,
    user: User = "",
    until: Until = None,
    change: GuardedChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Pause a batch: no further mail of it is sent until it is resumed, or until a time.

    $ outbox batches pause $BATCH --until 'in 2h'
    """
    request = pb.PauseBatchRequest(
        batch_id=batch_id, user_id=user, pause_end_time=to_timestamp(until)
    )
    with connection("scheduler", server) as client:
        paused = client.batches.PauseBatch(change.of(request))
    show(paused, output)


@app.command()
@with_option_groups
def resume(
    batch_id: BatchId,
    *,
    user: User = "",
    change: GuardedChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """End the pause of a batch. The limits of its sender still apply."""
    request = pb.ResumeBatchRequest(batch_id=batch_id, user_id=user)
    with connection("scheduler", server) as client:
        resumed = client.batches.ResumeBatch(change.of(request))
    show(resumed, output)


@app.command()
@with_option_groups
def update(
    batch_id: BatchId,
    *,
    user: User = "",
    content: TemplateOptions,
    header: Annotated[
        list[str] | None,
        typer.Option(
            "--header",
            metavar="'NAME: VALUE'",
            help="Headers that replace all of the batch. Repeatable.",
        ),
    ] = None,
    schedule_time: Annotated[
        datetime | None,
        typer.Option(
            "--schedule-time",
            parser=read_time,
            metavar="TIME",
            help="When the first unsent mail may be sent, such as 'in 10m', now.",
        ),
    ] = None,
    spacing: Annotated[
        timedelta | None,
        typer.Option(
            "--spacing",
            parser=read_duration,
            metavar="DURATION",
            help="Time between consecutive unsent mails, such as 5s.",
        ),
    ] = None,
    unset: Annotated[
        list[str] | None,
        typer.Option(
            "--unset", metavar="FIELD", help="Reset this field, such as html. Repeatable."
        ),
    ] = None,
    change: GuardedChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Change the templates, headers or times of a batch's unsent mail.

    $ outbox batches update $BATCH --subject 'Hello {{ first_name }}'

    $ outbox batches update $BATCH --schedule-time 'in 1d' --spacing 5s
    """
    given: dict[str, Any] = {
        **content.templates(),
        "headers": read_headers(header) if header else None,
        "schedule_time": to_timestamp(schedule_time),
        "spacing": to_duration(spacing),
    }
    given = {name: value for name, value in given.items() if value is not None}
    paths = [*given, *(name.replace("-", "_") for name in unset or ())]
    if not paths:
        raise typer.BadParameter("nothing to change: give an option, or --unset FIELD")
    request = pb.UpdateBatchRequest(
        batch=Batch(batch_id=batch_id, etag=change.etag, **given),
        update_mask=FieldMask(paths=paths),
        user_id=user,
    )
    with connection("scheduler", server) as client:
        changed = client.batches.UpdateBatch(change.of(request))
    show(changed, output)


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
