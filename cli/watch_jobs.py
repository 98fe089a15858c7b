"""`outbox jobs watch`: every change of a user's jobs, by WatchEmailJobs."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final, cast

import typer
from outbox.v1 import email_job_event_service_pb2 as pb
from outbox.v1.email_job_pb2 import EmailJobState
from outbox_client import CallError

from outbox_server.cli.client import Server, connection
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import (
    OfBatch,
    OfSender,
    User,
    enum_reader,
    time_option,
    to_timestamp,
)
from outbox_server.cli.output import (
    Output,
    OutputFormat,
    print_json_line,
    to_document,
    value_at,
)
from outbox_server.cli.terminal import note, say

# In the order of a line. Those that are empty are left out.
_COLUMNS: Final = (
    "event_time",
    "batch_id",
    "email_job_id",
    "state",
    "enhanced_code",
    "last_error",
)


@with_option_groups
def watch(
    *,
    user: User = "",
    sender: OfSender = "",
    batch: OfBatch = "",
    state: Annotated[
        list[int] | None,
        typer.Option(
            "--state",
            parser=enum_reader(EmailJobState, "EMAIL_JOB_STATE_"),
            metavar="STATE",
            help="Only changes to this state. Repeatable.",
        ),
    ] = None,
    resume_token: Annotated[
        str, typer.Option("--resume-token", help="Continue after the message with this token.")
    ] = "",
    after: Annotated[
        datetime | None,
        time_option("--after", "Begin at this time (default: now)."),
    ] = None,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show every change of a user's jobs as it is committed, until Ctrl-C.

    With `-o json`, each line is a JSON document: a message with its `resume_token`.

    $ outbox jobs watch --user acme --state SENT --state FAILED
    """
    request = pb.WatchEmailJobsRequest(
        user_id=user,
        sender_id=sender,
        batch_id=batch,
        states=cast("list[EmailJobState.ValueType]", state or []),
        resume_token=resume_token,
        start_time=to_timestamp(after),
    )
    with connection("scheduler", server) as client:
        for message in client.watch_email_jobs(request, trouble=_on_error):
            if output is OutputFormat.JSON:
                print_json_line(to_document(message))
                continue
            for event in message.email_job_events:
                say("  ".join(filter(None, (value_at(event, name) for name in _COLUMNS))))


def _on_error(error: CallError) -> None:
    note(f"trying again: {error.message}")
