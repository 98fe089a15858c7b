"""`outbox schedule`: uploads a batch and, with --wait, follows it to its end."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, BinaryIO

import typer
from outbox.v1 import batch_service_pb2 as pb
from outbox.v1.batch_pb2 import Batch, BatchMode, BatchOptions, DuplicatePolicy, Rejection
from outbox_client import Client

from outbox_server.cli.batches import REJECTION_COLUMNS
from outbox_server.cli.capabilities import check_dry_run
from outbox_server.cli.change_options import AuditOptions
from outbox_server.cli.client import Server, connection
from outbox_server.cli.flags import in_flags
from outbox_server.cli.follow import follow_to_end
from outbox_server.cli.lazy import EXIT_FAILED
from outbox_server.cli.mail_options import HeaderOptions, TemplateOptions, read_labels
from outbox_server.cli.mails import show_preview
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import (
    EmailColumn,
    SkipLines,
    User,
    duration_option,
    enum_reader,
    open_input,
    read_int32,
    time_option,
    to_duration,
    to_timestamp,
)
from outbox_server.cli.output import (
    Output,
    OutputFormat,
    print_json,
    print_rows,
    to_document,
    value_at,
)
from outbox_server.cli.progress import upload_progress
from outbox_server.cli.rejections import new_file, write_again
from outbox_server.cli.terminal import note

_READ_BYTES = 64 * 1024
_MAX_REJECTIONS_SHOWN = 10
# The maximum number of rows that PreviewBatch accepts.
_MAX_PREVIEWED_ROWS = 20
_SUMMARY = (
    "batch_id",
    "state",
    "accepted_count",
    "rejected_count",
    "duplicate_count",
    "suppressed_count",
    "schedule_time",
    "email_column",
)
_SENT_SUMMARY = ("counts.sent_count", "counts.failed_count", "counts.uncertain_count")

app = typer.Typer(add_completion=False)


@app.command()
@with_option_groups
def schedule(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="CSV file with a header row; - is stdin.")
    ],
    *,
    sender: Annotated[str, typer.Option("--sender", metavar="ID", help="Sender of the mails.")],
    user: User = "",
    content: TemplateOptions,
    schedule_time: Annotated[
        datetime | None,
        time_option(
            "--schedule-time",
            "When the first mail may be sent: 2026-12-24T18:00:00+01:00, 'in 10m', now.",
        ),
    ] = None,
    spacing: Annotated[
        timedelta | None,
        duration_option("--spacing", "Time between consecutive mails, such as 5s (default: 0s)."),
    ] = None,
    duplicates: Annotated[
        int | None,
        typer.Option(
            "--duplicates",
            parser=enum_reader(DuplicatePolicy, "DUPLICATE_POLICY_"),
            metavar="keep-first|keep-all",
            help="Which rows with the same address to send (default: keep-first).",
        ),
    ] = None,
    mode: Annotated[
        int | None,
        typer.Option(
            "--mode",
            parser=enum_reader(BatchMode, "BATCH_MODE_"),
            metavar="permissive|strict",
            help="With strict, one bad row rejects the batch (default: permissive).",
        ),
    ] = None,
    expire_after: Annotated[
        timedelta | None,
        duration_option(
            "--expire-after",
            "How long after its due time a mail may still be sent (default: for ever).",
        ),
    ] = None,
    spread_until: Annotated[
        datetime | None,
        time_option(
            "--spread-until", "Spread the mails evenly until this time, instead of --spacing."
        ),
    ] = None,
    time_zone: Annotated[
        str | None,
        typer.Option(
            "--time-zone",
            help="Time zone of a row's schedule_time without an offset, such as Europe/Berlin.",
        ),
    ] = None,
    email_column: EmailColumn = "",
    skip_lines: SkipLines = 0,
    mail: HeaderOptions,
    external_id: Annotated[
        str | None,
        typer.Option("--external-id", metavar="ID", help="Your own id of the batch."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            metavar="KEY=VALUE",
            help="Label of the batch and its jobs. Repeatable.",
        ),
    ] = None,
    external_id_column: Annotated[
        str | None,
        typer.Option(
            "--external-id-column", metavar="NAME", help="Column with your own id of each job."
        ),
    ] = None,
    label_column: Annotated[
        list[str] | None,
        typer.Option(
            "--label-column",
            metavar="NAME",
            help="Column whose cells are labels of their jobs. Repeatable.",
        ),
    ] = None,
    request: Annotated[
        str | None,
        typer.Option(
            "--request-id",
            "--request",
            metavar="ID",
            help="Id that makes retries safe (default: a new one, which is printed).",
        ),
    ] = None,
    change: AuditOptions,
    rejections: Annotated[
        Path | None,
        typer.Option(
            "--rejections",
            metavar="FILE",
            help="Write rejected rows and reasons to this new CSV, to fix and schedule again.",
        ),
    ] = None,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything and forecast the end; schedule nothing."),
    ] = False,
    preview: Annotated[
        list[int] | None,
        typer.Option(
            "--preview",
            parser=read_int32,
            metavar="ROW",
            help="Only show the mail of this row, from 1; 0 is the first one that would be sent. "
            "Repeatable, up to 20 rows.",
        ),
    ] = None,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Follow the batch to its end; exit code 1 if a mail failed."),
    ] = False,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    r"""Upload a CSV of recipients, of any size, as a batch.

    The addresses are in the column `email`, or in one whose name means e-mail
    (E-mail 1 - Value, Primary Email, E-Mail-Adresse, Courriel), or in the one
    that --email-column names. Every column is a template variable. The optional
    columns subject, body, html, schedule_time and time_zone apply to their row.
    A row with which the templates cannot be rendered is rejected.

    Mail to many people should let them unsubscribe with one click:
    --header 'List-Unsubscribe: <https://example.com/u?id={{ id }}>'
    --header 'List-Unsubscribe-Post: List-Unsubscribe=One-Click'

    $ outbox schedule people.csv --sender $SENDER --preview 1 \
      --subject 'Hello {{ first_name }}' --body 'Good to see you.'

    $ outbox schedule people.csv --sender $SENDER --schedule-time 'in 10m' \
      --subject 'Hello {{ first_name }}' --body 'Good to see you.' --wait
    """
    options = BatchOptions(
        request_id=request or str(uuid.uuid4()),
        user_id=user,
        sender_id=sender,
        **content.templates(),
        schedule_time=to_timestamp(schedule_time),
        spacing=to_duration(spacing),
        duplicates=DuplicatePolicy.ValueType(duplicates or 0),
        mode=BatchMode.ValueType(mode or 0),
        expire_after=to_duration(expire_after),
        spread_until=to_timestamp(spread_until),
        time_zone=time_zone or "",
        email_column=email_column,
        skip_lines=skip_lines,
        **mail.headers(),
        external_id=external_id or "",
        labels=read_labels(label or ()),
        external_id_column=external_id_column or "",
        label_columns=label_column or (),
    )
    _check_wait(wait=wait, creates=not dry and not preview)
    if preview:
        _preview(options, file, _rows_to_show(preview), server, output)
        return
    with _opened(file, again=rejections is not None) as source:
        if request is None and not dry:
            note(f"request_id {options.request_id}: pass it as --request-id to retry safely")
        with connection("scheduler", server) as client, new_file(rejections) as unsent:
            if dry:
                check_dry_run(client)
            answer = _upload(client, source, options, change, dry=dry)
            if unsent is not None and answer.batch.rejected_count:
                _write_rejections(client, answer, source, unsent, options)
            if output is OutputFormat.TABLE:
                _print_answer(answer, rejections)
            if wait:
                answer.batch.CopyFrom(follow_to_end(client, answer.batch, user))
                if output is OutputFormat.TABLE:
                    rows = _rows_of(answer.batch, ("state", *_SENT_SUMMARY))
                    print_rows(("field", "value"), rows)
    if output is OutputFormat.JSON:
        print_json(to_document(answer))
    if wait and (answer.batch.counts.failed_count or answer.batch.counts.uncertain_count):
        raise typer.Exit(EXIT_FAILED)


def _check_wait(*, wait: bool, creates: bool) -> None:
    if wait and not creates:
        raise typer.BadParameter(
            "--wait follows a batch, but --dry-run and --preview create none: use only one of them"
        )


def _rows_to_show(rows: Sequence[int]) -> Sequence[int]:
    """Return the numbers of the rows; none means the first one that would be sent."""
    wrong = next((row for row in rows if row < 0), None)
    if wrong is not None:
        raise typer.BadParameter(f"--preview: must be 0, or a row's number from 1 (got {wrong})")
    if 0 in rows and len(rows) > 1:
        raise typer.BadParameter("--preview 0 shows one mail: give it alone")
    if len(rows) > _MAX_PREVIEWED_ROWS:
        raise typer.BadParameter(
            f"--preview: at most {_MAX_PREVIEWED_ROWS} rows may be given (got {len(rows)})"
        )
    return [row for row in rows if row]


def _preview(
    options: BatchOptions,
    file: Path,
    rows: Sequence[int],
    server: str | None,
    output: OutputFormat,
) -> None:
    with _opened(file, again=False) as source, connection("scheduler", server) as client:
        if not show_preview(client, options, source, rows, output):
            raise typer.Exit(EXIT_FAILED)


def _write_rejections(
    client: Client,
    answer: pb.ScheduleBatchResponse,
    source: BinaryIO,
    target: BinaryIO,
    options: BatchOptions,
) -> None:
    write_again(
        source,
        _all_rejections(client, answer),
        target,
        email_column=options.email_column,
        skip_lines=options.skip_lines,
    )


def _all_rejections(client: Client, answer: pb.ScheduleBatchResponse) -> Iterable[Rejection]:
    """Return all rejections of a stored batch, or as many as a dry run has."""
    batch = answer.batch
    if batch.batch_id:
        request = pb.ListRejectionsRequest(batch_id=batch.batch_id, user_id=batch.user_id)
        return client.list_rejections(request)
    if len(answer.rejections) < batch.rejected_count:
        note(f"only the first {len(answer.rejections)} rejected rows are written")
    return answer.rejections


@contextmanager
def _opened(file: Path, *, again: bool) -> Iterator[BinaryIO]:
    """Open the CSV. A pipe that must be read `again` is copied to a temporary file."""
    with open_input(file) as source:
        if not again or source.seekable():
            yield source
            return
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(source, copy)
            copy.seek(0)
            yield copy


def _upload(
    client: Client, source: BinaryIO, options: BatchOptions, change: AuditOptions, *, dry: bool
) -> pb.ScheduleBatchResponse:
    with upload_progress("checking" if dry else "uploading") as progress:
        answer = client.upload(
            source,
            options,
            progress=progress,
            validate_only=dry,
            identity=change.identity,
            reason=change.change_reason,
        )
    batch = answer.batch
    rows = batch.accepted_count + batch.rejected_count
    rows += batch.duplicate_count + batch.suppressed_count
    note(
        f"{rows} rows read: {batch.accepted_count} {'would be ' if dry else ''}accepted, "
        f"{batch.rejected_count} rejected, {batch.duplicate_count} duplicate, "
        f"{batch.suppressed_count} suppressed{'; nothing was scheduled' if dry else ''}"
    )
    return answer


def _print_answer(answer: pb.ScheduleBatchResponse, written: Path | None) -> None:
    summary = _SUMMARY if answer.batch.batch_id else _SUMMARY[1:]
    print_rows(("field", "value"), _rows_of(answer.batch, summary))
    if answer.rejections:
        _print_rejections(answer.rejections, written)
        more = answer.batch.rejected_count > _MAX_REJECTIONS_SHOWN
        if written is None and answer.batch.batch_id and more:
            note(f"all rejections: outbox batches rejections {answer.batch.batch_id} --all")
    if answer.replayed:
        note("an earlier call with this request_id created the batch; nothing was changed")
    for notice in answer.notices:
        note(notice)
    end = value_at(answer, "forecast_end_time")
    if end:
        note(f"the last mail is forecast for {end}")


def _print_rejections(rejections: Sequence[Rejection], written: Path | None) -> None:
    shown = rejections[:_MAX_REJECTIONS_SHOWN]
    rows = ([in_flags(value_at(one, path)) for path in REJECTION_COLUMNS] for one in shown)
    print_rows(REJECTION_COLUMNS, rows)
    if written is not None:
        note(f"all rejected rows, to fix and schedule again: {written}")


def _rows_of(batch: Batch, paths: Sequence[str]) -> list[list[str]]:
    return [[path.rpartition(".")[2], value_at(batch, path)] for path in paths]
