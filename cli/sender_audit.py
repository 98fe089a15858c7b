"""`outbox stats audit`: StatsService.AuditSender."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer
from outbox.v1 import stats_service_pb2 as pb

from cli.client import Server, connection
from cli.options import User, read_time, to_timestamp
from cli.output import Output, OutputFormat, show


def audit(
    sender_id: Annotated[str, typer.Argument(metavar="SENDER_ID")],
    *,
    start_time: Annotated[
        datetime | None,
        typer.Option(
            "--start-time", parser=read_time, metavar="TIME", help="Unset: its first send."
        ),
    ] = None,
    end_time: Annotated[
        datetime | None,
        typer.Option("--end-time", parser=read_time, metavar="TIME", help="Unset: now."),
    ] = None,
    user: User = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Replay what a sender sent against its gap and limit.

    $ outbox stats audit 3
    """
    request = pb.AuditSenderRequest(
        sender_id=sender_id,
        user_id=user,
        start_time=to_timestamp(start_time),
        end_time=to_timestamp(end_time),
    )
    with connection("stats", server) as client:
        found = client.stats.AuditSender(request)
    show(found, output)
