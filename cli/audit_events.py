"""`outbox audit-events`: shows who changed what, by AuditService, for operators."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final

import typer
from outbox.v1 import audit_service_pb2 as pb

from outbox_server.cli.client import Server, connection, pages
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import Filtering, Paging, time_option, to_timestamp
from outbox_server.cli.output import Output, OutputFormat, show_list

_COLUMNS: Final = ("event_time", "actor", "identity", "action", "target", "reason")

app = typer.Typer(add_completion=False)


@app.command()
@with_option_groups
def list_events(
    *,
    user: Annotated[
        str, typer.Option("--user", metavar="ID", help="Only changes of what this user owns.")
    ] = "",
    target: Annotated[
        str,
        typer.Option("--target", help="Only changes of this target, such as senders/SENDER_ID."),
    ] = "",
    after: Annotated[
        datetime | None,
        time_option("--after", "Only changes at this time or later."),
    ] = None,
    before: Annotated[
        datetime | None,
        time_option("--before", "Only changes before this time."),
    ] = None,
    filtering: Filtering,
    paging: Paging,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List who changed what, the newest first (operators only).

    `-o json` shows the values before and after.

    $ outbox audit-events --user acme --filter 'action = DeleteSender'
    """
    request = pb.ListAuditEventsRequest(
        user_id=user,
        target=target,
        start_time=to_timestamp(after),
        end_time=to_timestamp(before),
        filter=filtering.filter,
        order_by=filtering.order_by,
    )
    with connection("scheduler", server) as client:
        page = pages(client.audit.ListAuditEvents, request, "audit_events", paging)
    show_list(page, "audit_events", _COLUMNS, output, what="changes")
