"""`outbox stats`: runs the stats service, and the commands of StatsService."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer
from outbox.v1 import stats_service_pb2 as pb

from outbox_server.cli.client import Server, connection, pages
from outbox_server.cli.forecast import forecast
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import (
    EndTime,
    Filtering,
    Paging,
    User,
    one_user,
    time_option,
    to_timestamp,
)
from outbox_server.cli.output import (
    Output,
    OutputFormat,
    print_json_line,
    print_rows,
    show,
    show_list,
    stdout,
    to_document,
    value_at,
)
from outbox_server.cli.series import series
from outbox_server.cli.service import run
from outbox_server.cli.terminal import note

_HOUR_COLUMNS = ("start_time", "sent_count", "failed_count")
_SENDER_COLUMNS = (
    "sender_id",
    "email",
    "counts.scheduled_count",
    "counts.sending_count",
    "counts.sent_count",
    "counts.failed_count",
)

_WATCH_COLUMNS = (
    "counts.scheduled_count",
    "counts.sending_count",
    "counts.sent_count",
    "counts.failed_count",
    "window_used_count",
)

_ENDPOINT_COLUMNS = (
    "user_id",
    "host",
    "port",
    "attempt_count",
    "replies",
    "latency_p50",
    "latency_p99",
    "circuit_open_time",
)

app = typer.Typer(invoke_without_command=True, add_completion=False)


@app.callback()
def stats(ctx: typer.Context) -> None:
    """Run the stats service: counts, forecasts, audits. Subcommands query a running one.

    Its settings are the OUTBOX_* variables. It listens on
    OUTBOX_STATS_LISTEN (127.0.0.1:50053) and waits for an up-to-date schema
    (`outbox migrate`). SIGTERM and Ctrl-C stop it.
    """
    if ctx.invoked_subcommand is None:
        run("stats")


@app.command()
def sender(
    sender_id: Annotated[
        str, typer.Argument(metavar="SENDER_ID", help="Id from `outbox senders list`.")
    ],
    user: User = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show the exact counts of a sender, its hourly window and its last 24 hours."""
    with connection("stats", server) as client:
        found = client.stats.GetSenderStats(
            pb.GetSenderStatsRequest(sender_id=sender_id, user_id=user)
        )
    show(found, output, without=("hours",))
    if output is OutputFormat.TABLE:
        busy = [hour for hour in found.hours if hour.sent_count or hour.failed_count]
        if busy:
            rows = ([value_at(hour, path) for path in _HOUR_COLUMNS] for hour in busy)
            print_rows(_HOUR_COLUMNS, rows)


@app.command(name="user")
@with_option_groups
def user_(
    user_id: Annotated[
        str,
        typer.Argument(metavar="USER_ID", show_default=False, help="The user; or use --user."),
    ] = "",
    *,
    user: User = "",
    paging: Paging,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show the exact counts of a user, in total and by sender.

    $ outbox stats user acme
    """
    request = pb.GetUserStatsRequest(user_id=one_user(user_id, user))
    with connection("stats", server) as client:
        found = pages(client.stats.GetUserStats, request, "senders", paging)
    show(found, output, without=("senders", "next_page_token"))
    if output is OutputFormat.TABLE and found.senders:
        names = [path.rpartition(".")[2] for path in _SENDER_COLUMNS]
        print_rows(
            names, ([value_at(one, path) for path in _SENDER_COLUMNS] for one in found.senders)
        )
        if found.next_page_token:
            note(f"more results: use --all, or --page-token {found.next_page_token}")


@app.command()
def watch(
    sender_id: Annotated[
        str, typer.Argument(metavar="SENDER_ID", help="Id from `outbox senders list`.")
    ],
    user: User = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Follow the counts of a sender, one line per change, until it is deleted or Ctrl-C."""
    request = pb.WatchSenderStatsRequest(sender_id=sender_id, user_id=user)
    with connection("stats", server) as client:
        for found in client.stats.WatchSenderStats(request, timeout=None):
            if output is OutputFormat.JSON:
                print_json_line(to_document(found))
            elif not found.done:
                shown = [f"{path}={value_at(found.stats, path)}" for path in _WATCH_COLUMNS]
                if found.stats.HasField("cooldown"):
                    shown.append(f"cooldown={value_at(found.stats, 'cooldown')}")
                stdout().print(value_at(found.stats, "read_time"), *shown)
    note("the sender is deleted")


@app.command()
def audit(
    sender_id: Annotated[
        str, typer.Argument(metavar="SENDER_ID", help="Id from `outbox senders list`.")
    ],
    *,
    start_time: Annotated[
        datetime | None,
        time_option("--start-time", "Start (default: its first send)."),
    ] = None,
    end_time: EndTime = None,
    user: User = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Compare everything that a sender sent with its gap and hourly limit.

    $ outbox stats audit $SENDER
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


app.command()(forecast)
app.command()(series)


@app.command()
@with_option_groups
def endpoints(
    *,
    user: User = "",
    filtering: Filtering,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show what happened lately at SMTP endpoints: replies, latencies, circuits.

    Lately means the last 5 to 10 minutes. An operator who names no user gets
    the endpoints of all users, and the relay, which belongs to no user.

    $ outbox stats endpoints --user acme
    """
    request = pb.ListEndpointStatsRequest(
        user_id=user, filter=filtering.filter, order_by=filtering.order_by
    )
    with connection("stats", server) as client:
        found = client.stats.ListEndpointStats(request)
    show_list(found, "endpoint_stats", _ENDPOINT_COLUMNS, output, what="endpoints with attempts")
