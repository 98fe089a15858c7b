"""`outbox jobs`: the commands of EmailJobService."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

import typer
from outbox.v1 import email_job_service_pb2 as pb
from outbox.v1.email_job_pb2 import EmailJobState

from outbox_server.cli.change_options import ChangeOptions
from outbox_server.cli.client import Server, connection, pages
from outbox_server.cli.exports import ExportFormat, ExportOutput, write_export
from outbox_server.cli.mails import show_mail
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import (
    Filtering,
    OfBatch,
    OfSender,
    Paging,
    User,
    duration_option,
    enum_reader,
    time_option,
    to_duration,
    to_timestamp,
)
from outbox_server.cli.output import Output, OutputFormat, show, show_list
from outbox_server.cli.terminal import note
from outbox_server.cli.watch_jobs import watch

_COLUMNS = (
    "email_job_id",
    "recipient",
    "state",
    "schedule_time",
    "send_time",
    "attempt_count",
    "last_error",
)
_EXPORT_COLUMNS = (
    "email_job.email_job_id",
    "email_job.user_id",
    "email_job.sender_id",
    "email_job.batch_id",
    "email_job.row_number",
    "email_job.recipient",
    "email_job.state",
    "email_job.create_time",
    "email_job.schedule_time",
    "email_job.send_time",
    "email_job.finish_time",
    "email_job.attempt_count",
    "email_job.message_id",
    "email_job.external_id",
    "email_job.labels",
    "email_job.test",
    "last_attempt.outcome",
    "last_attempt.reply_class",
    "last_attempt.smtp_code",
    "last_attempt.enhanced_code",
    "last_attempt.endpoint",
    "last_attempt.dispatcher_id",
    "last_attempt.message",
)
_ATTEMPT_COLUMNS = (
    "attempt_number",
    "start_time",
    "end_time",
    "outcome",
    "reply_class",
    "smtp_code",
    "enhanced_code",
    "endpoint",
    "dispatcher_id",
    "message",
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Show, watch, export, explain, cancel and retry e-mail jobs.",
)

app.command()(watch)

JobId = Annotated[str, typer.Argument(metavar="EMAIL_JOB_ID", help="Id from `outbox jobs list`.")]


@app.command()
def get(
    email_job_id: JobId,
    user: User = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show one e-mail job."""
    with connection("scheduler", server) as client:
        job = client.email_jobs.GetEmailJob(
            pb.GetEmailJobRequest(email_job_id=email_job_id, user_id=user)
        )
    show(job, output)


@app.command()
def render(
    email_job_id: JobId,
    user: User = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Write the mail of a job, as it would be sent now, to stdout.

    $ outbox jobs render $JOB
    """
    with connection("scheduler", server) as client:
        mail = client.email_jobs.RenderEmailJob(
            pb.RenderEmailJobRequest(email_job_id=email_job_id, user_id=user)
        )
    show_mail(mail, output)


@app.command(name="list")
@with_option_groups
def list_(
    *,
    user: User = "",
    sender: OfSender = "",
    batch: OfBatch = "",
    state: Annotated[
        int | None,
        typer.Option(
            "--state",
            parser=enum_reader(EmailJobState, "EMAIL_JOB_STATE_"),
            metavar="STATE",
            help="Only jobs in this state: scheduled, sent, failed, ...",
        ),
    ] = None,
    recipient: Annotated[
        str, typer.Option("--recipient", metavar="ADDRESS", help="Only jobs to this address.")
    ] = "",
    filtering: Filtering,
    paging: Paging,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List jobs in the order in which they were accepted, or in another one.

    $ outbox jobs list --user acme --state failed

    $ outbox jobs list --user acme --filter "attempt_count > 1" --order-by "create_time desc"
    """
    request = pb.ListEmailJobsRequest(
        user_id=user,
        sender_id=sender,
        batch_id=batch,
        state=EmailJobState.ValueType(state or 0),
        recipient=recipient,
        filter=filtering.filter,
        order_by=filtering.order_by,
    )
    with connection("scheduler", server) as client:
        page = pages(client.email_jobs.ListEmailJobs, request, "email_jobs", paging)
    show_list(page, "email_jobs", _COLUMNS, output, what="jobs")


@app.command()
def export(
    *,
    user: User = "",
    sender: OfSender = "",
    batch: OfBatch = "",
    filter_: Annotated[
        str, typer.Option("--filter", metavar="FILTER", help="Only what matches.")
    ] = "",
    server: Server = None,
    output: ExportOutput = ExportFormat.CSV,
) -> None:
    """Write all jobs, each with its last attempt, to stdout, as CSV or JSON lines.

    Each job is as it is when it is written: the export is not of one moment.

    $ outbox jobs export --user acme --filter "state = FAILED"
    """
    request = pb.ExportEmailJobsRequest(
        user_id=user, sender_id=sender, batch_id=batch, filter=filter_
    )
    with connection("scheduler", server) as client:
        count = write_export(client.export_email_jobs(request), _EXPORT_COLUMNS, output)
    note(f"{count} jobs")


Filter = Annotated[
    str,
    typer.Option(
        "--filter", metavar="FILTER", help="All jobs that match, such as 'row_number > 9'."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only count the jobs.")]


@app.command()
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
    """Cancel a waiting job, or all waiting jobs that match a filter.

    If it is too late for the one job, the command fails.

    $ outbox jobs cancel --user acme --filter "recipient = ann@example.com" --dry-run
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
@with_option_groups
def attempts(
    email_job_id: JobId,
    *,
    user: User = "",
    paging: Paging,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List the attempts of a job that have ended, oldest first."""
    request = pb.ListAttemptsRequest(email_job_id=email_job_id, user_id=user)
    with connection("scheduler", server) as client:
        page = pages(client.email_jobs.ListAttempts, request, "attempts", paging)
    show_list(page, "attempts", _ATTEMPT_COLUMNS, output, what="attempts")


@app.command()
def explain(
    email_job_id: JobId,
    user: User = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Explain why a job has not been sent yet, and when it will be."""
    with connection("scheduler", server) as client:
        found = client.email_jobs.ExplainEmailJob(
            pb.ExplainEmailJobRequest(email_job_id=email_job_id, user_id=user)
        )
    show(found, output, first="explanation")
