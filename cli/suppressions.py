"""`outbox suppressions`: the commands of SuppressionService."""

from __future__ import annotations

from typing import Annotated

import typer
from outbox.v1 import suppression_service_pb2 as pb
from outbox.v1.suppression_pb2 import Suppression

from outbox_server.cli.client import Server, connection, pages
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import Filtering, Paging, User
from outbox_server.cli.output import Output, OutputFormat, show, show_list
from outbox_server.cli.terminal import note

_COLUMNS = ("email", "reason", "create_time")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Manage the addresses that mail must never go to.",
)

Email = Annotated[str, typer.Argument(metavar="ADDRESS")]


@app.command()
def create(
    email: Email,
    *,
    user: User = "",
    reason: Annotated[str, typer.Option("--reason", help="Reason, in your words.")] = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Suppress an address: no mail of this user is sent to it any more.

    $ outbox suppressions create ann@example.com --user demo --reason unsubscribed
    """
    request = pb.CreateSuppressionRequest(
        user_id=user, suppression=Suppression(email=email, reason=reason)
    )
    with connection("scheduler", server) as client:
        made = client.suppressions.CreateSuppression(request)
    show(made, output)


@app.command()
def delete(
    email: Email, user: User = "", server: Server = None, output: Output = OutputFormat.TABLE
) -> None:
    """Allow mail to an address again."""
    with connection("scheduler", server) as client:
        answer = client.suppressions.DeleteSuppression(
            pb.DeleteSuppressionRequest(user_id=user, email=email)
        )
    show(answer, output)
    note(f"{email} is no longer suppressed")


@app.command(name="list")
@with_option_groups
def list_(
    *,
    user: User = "",
    filtering: Filtering,
    paging: Paging,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List the suppressed addresses of a user.

    $ outbox suppressions list --user demo
    """
    request = pb.ListSuppressionsRequest(
        user_id=user, filter=filtering.filter, order_by=filtering.order_by
    )
    with connection("scheduler", server) as client:
        page = pages(client.suppressions.ListSuppressions, request, "suppressions", paging)
    show_list(page, "suppressions", _COLUMNS, output, what="suppressions")
