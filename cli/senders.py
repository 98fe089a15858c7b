"""`outbox senders`: the commands of SenderService."""

from __future__ import annotations

import uuid
from typing import Annotated

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1 import sender_service_pb2 as pb
from outbox.v1.batch_pb2 import BatchOptions, Recipient
from outbox.v1.batch_service_pb2 import SendTestEmailRequest
from outbox.v1.sender_pb2 import Sender, SenderState

from outbox_server.cli.capabilities import check_dry_run
from outbox_server.cli.change_options import AuditOptions, ChangeOptions, GuardedChangeOptions
from outbox_server.cli.client import Server, connection, pages
from outbox_server.cli.mail_options import HeaderOptions, TemplateOptions
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.options import (
    Filtering,
    Paging,
    Until,
    User,
    enum_reader,
    to_timestamp,
)
from outbox_server.cli.output import Output, OutputFormat, show, show_list
from outbox_server.cli.sender_options import SenderOptions
from outbox_server.cli.terminal import note

_COLUMNS = (
    "sender_id",
    "user_id",
    "email",
    "state",
    "hourly_limit",
    "effective_min_gap",
    "effective_hourly_limit",
    "binding_limit",
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Create, show, update, test, pause and delete senders.",
)

SenderId = Annotated[
    str, typer.Argument(metavar="SENDER_ID", help="Id from `outbox senders list`.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and show the result; change nothing.")
]


@app.command()
@with_option_groups
def create(
    email: Annotated[str, typer.Option("--email", metavar="ADDRESS", help="Address in From.")],
    *,
    user: User = "",
    sender: SenderOptions,
    change: ChangeOptions,
    dry_run: DryRun = False,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    r"""Create a sender.

    $ outbox senders create --user acme --email news@example.com \
      --hourly-limit 200 --min-gap 2s

    $ outbox senders create --user acme --email news@example.com \
      --sending-hours 'mon-fri 09:00-17:00' --sending-zone Europe/Berlin

    $ outbox senders create --user acme --email news@example.com \
      --smtp-preset gmail --smtp-username news@example.com \
      --oauth2-client-id ID --oauth2-client-secret-file secret.txt \
      --oauth2-refresh-token-file token.txt
    """
    request = pb.CreateSenderRequest(
        user_id=user, sender=Sender(email=email, **sender.to_fields()), validate_only=dry_run
    )
    with connection("scheduler", server) as client:
        if dry_run:
            check_dry_run(client)
        made = client.senders.CreateSender(change.of(request))
    show(made, output)


@app.command(name="show", hidden=True)
@app.command()
def get(
    sender_id: SenderId,
    user: User = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show one sender, and the limits in effect with the rule that sets each."""
    with connection("scheduler", server) as client:
        found = client.senders.GetSender(pb.GetSenderRequest(sender_id=sender_id, user_id=user))
    show(found, output)


@app.command(name="list")
@with_option_groups
def list_(
    *,
    user: User = "",
    state: Annotated[
        int | None,
        typer.Option(
            "--state",
            parser=enum_reader(SenderState, "SENDER_STATE_"),
            metavar="active|paused",
            help="Only senders in this state.",
        ),
    ] = None,
    filtering: Filtering,
    paging: Paging,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List the senders of a user, oldest first, or in another order.

    $ outbox senders list --user acme
    """
    request = pb.ListSendersRequest(
        user_id=user,
        state=SenderState.ValueType(state or 0),
        filter=filtering.filter,
        order_by=filtering.order_by,
    )
    with connection("scheduler", server) as client:
        page = pages(client.senders.ListSenders, request, "senders", paging)
    # The column is shown only if it is not empty, because it takes room from the others.
    cooling = any(sender.HasField("cooldown") for sender in page.senders)
    columns = (*_COLUMNS, "cooldown") if cooling else _COLUMNS
    show_list(page, "senders", columns, output, what="senders")


@app.command()
@with_option_groups
def update(
    sender_id: SenderId,
    *,
    user: User = "",
    email: Annotated[
        str | None, typer.Option("--email", metavar="ADDRESS", help="Address in From.")
    ] = None,
    sender: SenderOptions,
    unset: Annotated[
        list[str] | None,
        typer.Option(
            "--unset", metavar="FIELD", help="Reset this field, such as min_gap. Repeatable."
        ),
    ] = None,
    change: GuardedChangeOptions,
    dry_run: DryRun = False,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Change the given fields of a sender. The change applies from the next send on.

    $ outbox senders update $SENDER --hourly-limit 100 --unset min_gap

    $ outbox senders update $SENDER --unset sending_hours
    """
    given = sender.to_fields()
    if email is not None:
        given["email"] = email
    paths = [*given, *(name.replace("-", "_") for name in unset or ())]
    if not paths:
        raise typer.BadParameter("nothing to change: give an option, or --unset FIELD")
    request = pb.UpdateSenderRequest(
        sender=Sender(sender_id=sender_id, etag=change.etag, **given),
        update_mask=FieldMask(paths=paths),
        user_id=user,
        validate_only=dry_run,
    )
    with connection("scheduler", server) as client:
        if dry_run:
            check_dry_run(client)
        changed = client.senders.UpdateSender(change.of(request))
    show(changed, output)


@app.command(name="test")
@with_option_groups
def send_test(
    sender_id: SenderId,
    *,
    recipient: Annotated[
        str, typer.Option("--recipient", metavar="ADDRESS", help="Address of the mail.")
    ],
    content: TemplateOptions,
    mail: HeaderOptions,
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column", metavar="NAME=VALUE", help="Value of a template variable. Repeatable."
        ),
    ] = None,
    request: Annotated[
        str | None,
        typer.Option(
            "--request-id",
            "--request",
            metavar="ID",
            help="Id that makes retries safe (default: new).",
        ),
    ] = None,
    change: AuditOptions,
    user: User = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    r"""Send one test mail, due at once, within the limits of the sender.

    Without --subject, --body and --html, the mail says that the sender works.

    $ outbox senders test $SENDER --recipient me@example.com \
      --body 'Dear {{ name }}' --column name=Ann
    """
    given = {name: text for name, text in content.templates().items() if text is not None}
    given.setdefault("subject", "A test of Outbox")
    if not given.keys() & {"body", "html"}:
        given["body"] = "This mail shows that the sender works."
    options = BatchOptions(
        request_id=request or str(uuid.uuid4()),
        user_id=user,
        sender_id=sender_id,
        **given,
        **mail.headers(),
    )
    columns = dict(map(_column, column or ()))
    asked = change.of(
        SendTestEmailRequest(options=options, recipient=Recipient(email=recipient, columns=columns))
    )
    with connection("scheduler", server) as client:
        sent = client.batches.SendTestEmail(asked)
    for notice in sent.notices:
        note(notice)
    show(sent, output)
    if output is OutputFormat.TABLE:
        note(f"follow it: outbox jobs explain {sent.email_job.email_job_id}")


def _column(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"--column must be NAME=VALUE (got {text!r})")
    return name, value


@app.command()
@with_option_groups
def delete(
    sender_id: SenderId,
    *,
    user: User = "",
    force: Annotated[
        bool,
        typer.Option("--force", help="Also cancel its waiting jobs, which otherwise prevent this."),
    ] = False,
    change: GuardedChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Delete a sender. Its jobs and batches can still be read."""
    with connection("scheduler", server) as client:
        answer = client.senders.DeleteSender(
            change.of(pb.DeleteSenderRequest(sender_id=sender_id, user_id=user, force=force))
        )
    show(answer, output)
    note(f"sender {sender_id} is deleted")


@app.command()
@with_option_groups
def pause(
    sender_id: SenderId,
    *,
    user: User = "",
    until: Until = None,
    change: GuardedChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Pause a sender: it begins no more sends until it is resumed, or until a time.

    $ outbox senders pause $SENDER --until 'in 12h'
    """
    request = pb.PauseSenderRequest(
        sender_id=sender_id, user_id=user, pause_end_time=to_timestamp(until)
    )
    with connection("scheduler", server) as client:
        paused = client.senders.PauseSender(change.of(request))
    show(paused, output)


@app.command()
@with_option_groups
def resume(
    sender_id: SenderId,
    *,
    user: User = "",
    change: GuardedChangeOptions,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Resume a paused sender, and end its cooldown. Its limits still apply."""
    with connection("scheduler", server) as client:
        resumed = client.senders.ResumeSender(
            change.of(pb.ResumeSenderRequest(sender_id=sender_id, user_id=user))
        )
    show(resumed, output)


@app.command()
def verify(
    sender_id: SenderId,
    user: User = "",
    recipient: Annotated[
        str,
        typer.Option(
            "--recipient",
            metavar="ADDRESS",
            help="Address for RCPT (default: the sender's own address).",
        ),
    ] = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Test a sender's SMTP session up to RCPT, without sending. Exit code 1 means not ready.

    $ outbox senders verify $SENDER
    """
    with connection("scheduler", server) as client:
        found = client.senders.VerifySender(
            pb.VerifySenderRequest(sender_id=sender_id, user_id=user, recipient=recipient)
        )
    show(found, output)
    if not found.ready:
        raise typer.Exit(1)
