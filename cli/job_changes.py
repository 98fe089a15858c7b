"""The commands of `outbox jobs` that change jobs: cancel, reschedule, retry and resolve."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

import typer
from outbox.v1 import email_job_service_pb2 as pb

from outbox_server.cli.change_options import ChangeOptions
from outbox_server.cli.client import Server, connection
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import (
    User,
    duration_option,
    time_option,
    to_duration,
    to_timestamp,
)
from outbox_server.cli.output import Output, OutputFormat, show

JobId = Annotated[str, typer.Argument(metavar="EMAIL_JOB_ID", help="Id from `outbox jobs list`.")]
Filter = Annotated[
    str,
    typer.Option(
        "--filter", metavar="FILTER", help="All jobs that match, such as 'row_number > 9'."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only count the jobs.")]


@with_option_groups
def cancel(
    email_job_id: Annotated[
        str,
        typer.Argument(
            metavar="EMAIL_JOB_ID", show_default=False, help="Id from `outbox jobs list`."
        ),
    ] = "",
    *,
    filter_: Filter = "",
    dry_run: DryRun = False,
    user: User = "",
    change: ChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    r"""Cancel a waiting job, or all waiting jobs that match a filter.

    If it is too late for the one job, the command fails.

    $ outbox jobs cancel --user acme --filter "recipient = ann@example.com" \
      --dry-run
    """
    if bool(email_job_id) == bool(filter_):
        raise typer.BadParameter("give a job's id or --filter")
    with connection("scheduler", server) as client:
        if filter_:
            asked = pb.CancelEmailJobsRequest(user_id=user, filter=filter_, validate_only=dry_run)
            done = _in_parts(client.email_jobs.CancelEmailJobs, asked, "cancelled_count", change)
            show(done, output)
            return
        job = client.email_jobs.CancelEmailJob(
            change.of(pb.CancelEmailJobRequest(email_job_id=email_job_id, user_id=user))
        )
    show(job, output)


@with_option_groups
def reschedule(
    *,
    filter_: Annotated[
        str, typer.Option("--filter", metavar="FILTER", help="The jobs, such as 'row_number > 9'.")
    ],
    at: Annotated[
        datetime | None,
        time_option("--at", "When all jobs are due."),
    ] = None,
    delay: Annotated[
        timedelta | None,
        duration_option("--delay", "How much later, such as 2h."),
    ] = None,
    dry_run: DryRun = False,
    user: User = "",
    change: ChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Give all waiting jobs that match a filter another due time.

    $ outbox jobs reschedule --user acme --filter "sender_id = $SENDER" --delay 2h
    """
    if (at is None) == (delay is None):
        raise typer.BadParameter("give --at or --delay")
    request = pb.RescheduleEmailJobsRequest(
        user_id=user,
        filter=filter_,
        validate_only=dry_run,
        schedule_time=to_timestamp(at),
        delay=to_duration(delay),
    )
    with connection("scheduler", server) as client:
        method = client.email_jobs.RescheduleEmailJobs
        done = _in_parts(method, request, "rescheduled_count", change)
    show(done, output)


def _in_parts(method: Callable[[Any], Any], request: Any, count: str, change: ChangeOptions) -> Any:
    """Call a method until no part is left, and return its answer with the sum of the counts."""
    total, part = 0, 0
    while True:
        answer = method(change.of(request, part))
        part += 1
        total += getattr(answer, count)
        request.page_token = answer.next_page_token
        if not request.page_token:
            setattr(answer, count, total)
            return answer


@with_option_groups
def retry(
    email_job_ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="EMAIL_JOB_ID", show_default=False, help="Ids from `outbox jobs list`."
        ),
    ] = None,
    *,
    batch: Annotated[
        str, typer.Option("--batch", metavar="ID", help="Only failed jobs of this batch.")
    ] = "",
    sender: Annotated[
        str, typer.Option("--sender", metavar="ID", help="Only failed jobs of this sender.")
    ] = "",
    filter_: Filter = "",
    dry_run: DryRun = False,
    user: User = "",
    change: ChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Schedule failed jobs again, due now. Jobs in other states are skipped.

    $ outbox jobs retry --batch $BATCH
    """
    request = pb.RetryEmailJobsRequest(
        user_id=user,
        batch_id=batch,
        sender_id=sender,
        email_job_ids=email_job_ids or [],
        filter=filter_,
        validate_only=dry_run,
    )
    with connection("scheduler", server) as client:
        answer = _in_parts(client.email_jobs.RetryEmailJobs, request, "retried_count", change)
    show(answer, output)


class Resolution(StrEnum):
    """What to do with a job in UNCERTAIN."""

    SENT = "sent"
    RESEND = "resend"


@with_option_groups
def resolve(
    email_job_id: JobId,
    resolution: Annotated[
        Resolution,
        typer.Argument(
            metavar="sent|resend",
            help="sent if the mail arrived, resend to send it again.",
            show_default=False,
        ),
    ],
    *,
    user: User = "",
    change: ChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Resolve a job in UNCERTAIN, for which it is unknown whether the mail arrived.

    $ outbox jobs resolve $JOB sent
    """
    request = pb.ResolveEmailJobRequest(
        email_job_id=email_job_id,
        resolution=pb.UncertainResolution.Value(f"UNCERTAIN_RESOLUTION_{resolution.name}"),
        user_id=user,
    )
    with connection("scheduler", server) as client:
        job = client.email_jobs.ResolveEmailJob(change.of(request))
    show(job, output)
