"""`outbox stats forecast`: calls StatsService.ForecastBatch."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

import typer
from outbox.v1 import stats_service_pb2 as pb
from outbox.v1.batch_pb2 import BatchOptions

from outbox_server.cli.client import Server, connection
from outbox_server.cli.options import (
    User,
    duration_option,
    read_int64,
    time_option,
    to_duration,
    to_timestamp,
)
from outbox_server.cli.output import Output, OutputFormat, show


def forecast(
    batch_id: Annotated[
        str,
        typer.Argument(
            metavar="BATCH_ID", help="Batch to forecast; leave it out for a planned batch."
        ),
    ] = "",
    *,
    sender: Annotated[
        str, typer.Option("--sender", metavar="ID", help="Sender of the planned batch.")
    ] = "",
    recipient_count: Annotated[
        int,
        typer.Option(
            "--recipient-count",
            parser=read_int64,
            metavar="N",
            show_default=False,
            help="Number of recipients of the planned batch.",
        ),
    ] = 0,
    schedule_time: Annotated[
        datetime | None,
        time_option(
            "--schedule-time",
            "When its first mail may be sent: 2026-12-24T18:00:00+01:00, 'in 10m', now.",
        ),
    ] = None,
    spacing: Annotated[
        timedelta | None,
        duration_option("--spacing", "Time between mails."),
    ] = None,
    spread_until: Annotated[
        datetime | None,
        time_option("--spread-until", "Spread evenly until then."),
    ] = None,
    expire_after: Annotated[
        timedelta | None,
        duration_option("--expire-after", "How long after its due time a mail may still be sent."),
    ] = None,
    user: User = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    r"""Forecast when a batch will have been sent, and which limit decides.

    $ outbox stats forecast $BATCH

    $ outbox stats forecast --sender $SENDER --recipient-count 10000 \
      --schedule-time 'in 1h'
    """
    if bool(batch_id) == bool(sender):
        raise typer.BadParameter("give either a BATCH_ID, or --sender and --recipient-count")
    planned_only = {
        "--recipient-count": recipient_count or None,
        "--schedule-time": schedule_time,
        "--spacing": spacing,
        "--spread-until": spread_until,
        "--expire-after": expire_after,
    }
    named = [name for name, value in planned_only.items() if value is not None]
    if batch_id and named:
        raise typer.BadParameter(
            f"{', '.join(named)}: only for a planned batch; an accepted one has its own values"
        )
    request = pb.ForecastBatchRequest(user_id=user)
    if batch_id:
        request.batch_id = batch_id
    else:
        options = BatchOptions(
            sender_id=sender,
            schedule_time=to_timestamp(schedule_time),
            spacing=to_duration(spacing),
            spread_until=to_timestamp(spread_until),
            expire_after=to_duration(expire_after),
        )
        planned = pb.PlannedBatch(options=options, recipient_count=recipient_count)
        request.planned_batch.CopyFrom(planned)
    with connection("stats", server) as client:
        found = client.stats.ForecastBatch(request)
    show(found, output, first="explanation")
