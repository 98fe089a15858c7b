"""`outbox jobs`: the commands of EmailJobService."""

from __future__ import annotations

from typing import Annotated

import typer
from outbox.v1 import email_job_service_pb2 as pb
from outbox.v1.email_job_pb2 import EmailJobState

from outbox_server.cli.client import Server, connection, pages
from outbox_server.cli.exports import ExportFormat, ExportOutput, write_export
from outbox_server.cli.job_changes import JobId, cancel, reschedule, resolve, retry
from outbox_server.cli.mails import show_mail
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import (
    Filtering,
    OfBatch,
    OfSender,
    Paging,
    User,
    enum_reader,
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
    r"""List jobs in the order in which they were accepted, or in another one.

    $ outbox jobs list --user acme --state failed

    $ outbox jobs list --user acme --filter "attempt_count > 1" \
      --order-by "create_time desc"
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

    Each line shows its job at the time when the line is written.

    $ outbox jobs export --user acme --filter "state = FAILED"
    """
    request = pb.ExportEmailJobsRequest(
        user_id=user, sender_id=sender, batch_id=batch, filter=filter_
    )
    with connection("scheduler", server) as client:
        count = write_export(client.export_email_jobs(request), _EXPORT_COLUMNS, output)
    note(f"{count} jobs")


app.command()(cancel)
app.command()(reschedule)
app.command()(retry)
app.command()(resolve)


@app.command()
@with_option_groups
def attempts(
    email_job_id: JobId,
    *,
    user: User = "",
    filtering: Filtering,
    paging: Paging,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List the attempts of a job that have ended, oldest first."""
    request = pb.ListAttemptsRequest(
        email_job_id=email_job_id,
        user_id=user,
        filter=filtering.filter,
        order_by=filtering.order_by,
    )
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
