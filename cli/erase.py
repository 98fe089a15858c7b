"""`outbox erase`: erases all stored data about one recipient."""

from __future__ import annotations

import time
from itertools import count
from typing import Annotated, Final

import typer
from outbox.v1 import suppression_service_pb2 as pb

from outbox_server.cli.change_options import ChangeOptions
from outbox_server.cli.client import Server, connection
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import User
from outbox_server.cli.output import Output, OutputFormat, show
from outbox_server.cli.terminal import note

_PAUSE_S: Final = 1.0

app = typer.Typer(add_completion=False)


@app.command()
@with_option_groups
def erase(
    email: Annotated[str, typer.Argument(metavar="ADDRESS", help="Mail address of the recipient.")],
    *,
    user: User = "",
    change: ChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Erase the address, variables and replies of one recipient from a user's data.

    Waiting mail to the address is ended first, and the address stays
    suppressed, as a hash. Counts stay. The command waits for mail that
    is being sent. If it is interrupted, run it again.

    $ outbox erase ann@example.com --user acme
    """
    request = pb.EraseRecipientRequest(user_id=user, email=email)
    total = pb.EraseRecipientResponse()
    with connection("scheduler", server) as client:
        for part in count():
            done = client.suppressions.EraseRecipient(change.of(request, part))
            total.suppression.CopyFrom(done.suppression)
            total.suppressed_count += done.suppressed_count
            total.erased_count += done.erased_count
            total.rejection_count += done.rejection_count
            if not done.in_flight_count:
                break
            note(
                f"{done.in_flight_count} mails to the address are being sent: waiting for their end"
            )
            time.sleep(_PAUSE_S)
    show(total, output)
