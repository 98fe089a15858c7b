"""`outbox dispatcher`: runs a dispatcher, and the commands of DispatcherService."""

from __future__ import annotations

from typing import Annotated

import typer
from outbox.v1 import dispatcher_service_pb2 as pb

from outbox_server.cli.addresses import read_endpoints
from outbox_server.cli.change_options import ChangeOptions
from outbox_server.cli.client import Server, connection
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import Filtering
from outbox_server.cli.output import (
    Output,
    OutputFormat,
    print_rows,
    show,
    show_list,
    value_at,
)
from outbox_server.cli.service import run
from outbox_server.cli.terminal import note

_DISPATCHER_COLUMNS = (
    "dispatcher_id",
    "state",
    "in_flight_count",
    "concurrency",
    "sent_per_second",
    "oldest_lease_time",
    "start_time",
    "report_time",
)
_ENDPOINT_COLUMNS = (
    "host",
    "port",
    "connection_count",
    "circuit_open_time",
    "next_probe_time",
    "last_error",
    "last_error_time",
)

app = typer.Typer(invoke_without_command=True, add_completion=False)


@app.callback()
def dispatcher(
    ctx: typer.Context,
    *,
    hold: Annotated[
        bool,
        typer.Option(
            "--hold",
            help="First hold the installation: nothing is sent until an operator releases it "
            "(`outbox held`).",
        ),
    ] = False,
) -> None:
    """Run a dispatcher, which sends due mail. Subcommands query a running one.

    Its settings are the OUTBOX_* variables. It listens on
    OUTBOX_DISPATCHER_LISTEN (127.0.0.1:50052) and waits for an up-to-date
    schema (`outbox migrate`). SIGTERM and Ctrl-C drain it. Any number of
    dispatchers may run at the same time.
    """
    if ctx.invoked_subcommand is None:
        if hold:
            _hold()
        run("dispatcher")
    elif hold:
        raise typer.BadParameter(
            "--hold works only when a dispatcher starts; use `outbox held begin`"
        )


def _hold() -> None:
    # Imported here because SQLAlchemy is slow to import, and clients do not need it.
    from outbox_server.cli.database import run_on
    from outbox_server.shared.holds.requesting import request_hold
    from outbox_server.shared.settings import load_settings

    new = run_on("OUTBOX_DATABASE_URL", request_hold(load_settings()))
    note("the installation is held" if new else "the installation is held already")


@app.command()
def status(server: Server = None, output: Output = OutputFormat.TABLE) -> None:
    """Show the state of a dispatcher. If several run, choose one with --server."""
    with connection("dispatcher", server) as client:
        found = client.dispatcher.GetDispatcherStatus(pb.GetDispatcherStatusRequest())
    show(found, output, without=("endpoints",))
    if output is OutputFormat.TABLE and found.endpoints:
        print_rows(
            _ENDPOINT_COLUMNS,
            ([value_at(one, path) for path in _ENDPOINT_COLUMNS] for one in found.endpoints),
        )
    others = [] if server else (read_endpoints() or {}).get("dispatchers", [])[1:]
    if others:
        note(f"several dispatchers run: choose another one with --server {' or '.join(others)}")


@app.command(name="list")
@with_option_groups
def list_(
    *, filtering: Filtering, server: Server = None, output: Output = OutputFormat.TABLE
) -> None:
    """List all dispatchers of the installation that run, by asking one of them."""
    request = pb.ListDispatchersRequest(filter=filtering.filter, order_by=filtering.order_by)
    with connection("dispatcher", server) as client:
        found = client.dispatcher.ListDispatchers(request)
    show_list(found, "dispatchers", _DISPATCHER_COLUMNS, output, what="dispatchers")


@app.command()
@with_option_groups
def drain(
    *, change: ChangeOptions, server: Server = None, output: Output = OutputFormat.TABLE
) -> None:
    """Let a dispatcher finish its sends in flight and take no more jobs until it is restarted."""
    with connection("dispatcher", server) as client:
        request = change.of(pb.DrainDispatcherRequest())
        answer = client.dispatcher.DrainDispatcher(request)
    show(answer, output)
