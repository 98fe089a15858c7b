"""`outbox suppressions`: the commands of SuppressionService."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import typer
from outbox.v1 import suppression_service_pb2 as pb
from outbox.v1.suppression_pb2 import Suppression

from outbox_server.cli.change_options import (
    GuardedChangeOptions,
    ReasonedChangeOptions,
)
from outbox_server.cli.client import Server, connection, pages, upload_timeout
from outbox_server.cli.exports import ExportFormat, ExportOutput, write_export
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import EmailColumn, Filtering, Paging, SkipLines, User, open_input
from outbox_server.cli.output import Output, OutputFormat, show, show_list
from outbox_server.cli.terminal import note

_CHUNK: Final = 64 * 1024
_COLUMNS = ("email", "reason", "create_time")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Manage the addresses that mail must never go to.",
)

Email = Annotated[str, typer.Argument(metavar="ADDRESS", help="Mail address.")]


@app.command()
@with_option_groups
def create(
    email: Email,
    *,
    user: User = "",
    reason: Annotated[str, typer.Option("--reason", help="Reason, in your words.")] = "",
    change: ReasonedChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Suppress an address: no mail of this user is sent to it any more.

    $ outbox suppressions create ann@example.com --user acme --reason unsubscribed
    """
    request = pb.CreateSuppressionRequest(
        user_id=user, suppression=Suppression(email=email, reason=reason)
    )
    with connection("scheduler", server) as client:
        made = client.suppressions.CreateSuppression(change.of(request))
    show(made, output)


@app.command()
def get(
    email: Email, user: User = "", server: Server = None, output: Output = OutputFormat.TABLE
) -> None:
    """Show the suppression of an address; exit code 1 if mail to it is not suppressed."""
    with connection("scheduler", server) as client:
        found = client.suppressions.GetSuppression(
            pb.GetSuppressionRequest(user_id=user, email=email)
        )
    show(found, output)


@app.command(name="import")
@with_option_groups
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A CSV; - is stdin.")],
    *,
    user: User = "",
    reason: Annotated[
        str, typer.Option("--reason", help="Reason of rows that have none of their own.")
    ] = "",
    email_column: EmailColumn = "",
    skip_lines: SkipLines = 0,
    change: ReasonedChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    r"""Suppress all addresses of a CSV, such as one that `export` wrote.

    A column `reason` has the reason of each row. A ' in front of =, +, - or @,
    which makes such a cell a text in spreadsheets, is removed. If the import is
    interrupted, run it again: what is suppressed already stays as it is. With
    the same --request-id, the answer counts both runs.

    $ outbox suppressions import unsubscribed.csv --user acme \
      --reason unsubscribed
    """
    first = change.of(
        pb.ImportSuppressionsRequest(
            user_id=user,
            suppression_reason=reason,
            email_column=email_column,
            skip_lines=skip_lines,
        )
    )
    with open_input(file) as source, connection("scheduler", server) as client:
        answer = client.suppressions.ImportSuppressions(
            _messages(first, source), timeout=upload_timeout()
        )
    show(answer, output)


def _messages(
    first: pb.ImportSuppressionsRequest, source: BinaryIO
) -> Iterator[pb.ImportSuppressionsRequest]:
    yield first
    while chunk := source.read(_CHUNK):
        yield pb.ImportSuppressionsRequest(chunk=chunk)


@app.command()
def export(
    *,
    user: User = "",
    filter_: Annotated[
        str, typer.Option("--filter", metavar="FILTER", help="Only what matches.")
    ] = "",
    server: Server = None,
    output: ExportOutput = ExportFormat.CSV,
) -> None:
    """Write all suppressions of a user to stdout, as CSV or JSON lines.

    In a CSV, a cell that spreadsheets would take for a formula gets a ' in front.
    `import` removes it.

    $ outbox suppressions export --user acme
    """
    request = pb.ExportSuppressionsRequest(user_id=user, filter=filter_)
    with connection("scheduler", server) as client:
        count = write_export(client.export_suppressions(request), _COLUMNS, output)
    note(f"{count} suppressions")


@app.command()
@with_option_groups
def delete(
    email: Email,
    *,
    user: User = "",
    change: GuardedChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Allow mail to an address again."""
    with connection("scheduler", server) as client:
        answer = client.suppressions.DeleteSuppression(
            change.of(pb.DeleteSuppressionRequest(user_id=user, email=email))
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

    $ outbox suppressions list --user acme
    """
    request = pb.ListSuppressionsRequest(
        user_id=user, filter=filtering.filter, order_by=filtering.order_by
    )
    with connection("scheduler", server) as client:
        page = pages(client.suppressions.ListSuppressions, request, "suppressions", paging)
    show_list(page, "suppressions", _COLUMNS, output, what="suppressions")
