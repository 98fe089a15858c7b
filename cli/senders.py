"""`outbox senders`: SenderService."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1 import sender_service_pb2 as pb
from outbox.v1.sender_pb2 import Sender, SenderState, SmtpEndpoint, SmtpPreset, SmtpSecurity

from cli.client import Server, connection, pages
from cli.oauth2_options import (
    ClientId,
    ClientSecretFile,
    OAuth2Options,
    Preset,
    RefreshTokenFile,
    Scope,
    Tenant,
    TokenUrl,
)
from cli.options import (
    AllPages,
    PageSize,
    PageToken,
    User,
    enum_reader,
    read_duration,
    read_int32,
    text_or_file,
    to_duration,
)
from cli.output import Output, OutputFormat, note, show, show_list
from cli.sending_hours import HoursOption, ZoneOption, to_sending_hours

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
    help="Create, show, change, pause and delete senders.",
)

SenderId = Annotated[str, typer.Argument(metavar="SENDER_ID")]
DisplayName = Annotated[
    str | None, typer.Option("--display-name", help="The name in From beside the address.")
]
HourlyLimit = Annotated[
    int | None,
    typer.Option(
        "--hourly-limit",
        parser=read_int32,
        metavar="N",
        help="The most mails in any trailing hour: 1 to 1000000.",
    ),
]
MinGap = Annotated[
    timedelta | None,
    typer.Option(
        "--min-gap",
        parser=read_duration,
        metavar="DURATION",
        help="From the end of a send to the start of the next, such as 2s.",
    ),
]
MaxInFlight = Annotated[
    int | None,
    typer.Option(
        "--max-in-flight",
        parser=read_int32,
        metavar="N",
        help="Sends at once; matters only without a gap.",
    ),
]
SmtpHost = Annotated[
    str | None, typer.Option("--smtp-host", help="Where the mail is handed in; unset: the relay.")
]
SmtpPort = Annotated[
    int,
    typer.Option("--smtp-port", parser=read_int32, metavar="N", help="0: 465 with tls, else 587."),
]
Security = Annotated[
    int | None,
    typer.Option(
        "--smtp-security",
        parser=enum_reader(SmtpSecurity, "SMTP_SECURITY_"),
        metavar="none|starttls|tls",
        help="Unset: tls for port 465, else starttls.",
    ),
]
SmtpUsername = Annotated[str, typer.Option("--smtp-username", help="To sign in with.")]
# Never the password itself: every user of the machine sees the arguments of a process.
SmtpPasswordFile = Annotated[
    Path | None,
    typer.Option("--smtp-password-file", help="A file with the password alone; -: stdin."),
]
SmtpCa = Annotated[
    Path | None,
    typer.Option(
        "--smtp-ca", help="PEM file of a private CA that may sign the server's certificate."
    ),
]


@app.command()
def create(
    email: Annotated[str, typer.Option("--email", help="The address in From.")],
    *,
    user: User = "",
    display_name: DisplayName = None,
    hourly_limit: HourlyLimit = None,
    min_gap: MinGap = None,
    max_in_flight: MaxInFlight = None,
    sending_hours: HoursOption = None,
    sending_zone: ZoneOption = None,
    smtp_host: SmtpHost = None,
    smtp_port: SmtpPort = 0,
    smtp_security: Security = None,
    smtp_username: SmtpUsername = "",
    smtp_password_file: SmtpPasswordFile = None,
    smtp_ca: SmtpCa = None,
    smtp_preset: Preset = None,
    oauth2_token_url: TokenUrl = "",
    oauth2_client_id: ClientId = "",
    oauth2_client_secret_file: ClientSecretFile = None,
    oauth2_refresh_token_file: RefreshTokenFile = None,
    oauth2_scope: Scope = "",
    oauth2_tenant: Tenant = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Create a sender.

    $ outbox senders create --user demo --email news@example.com --hourly-limit 200 --min-gap 2s

    $ outbox senders create --user demo --email news@example.com
    --sending-hours 'mon-fri 09:00-17:00' --sending-zone Europe/Berlin

    $ outbox senders create --user demo --email news@example.com --smtp-preset gmail
    --smtp-username news@example.com --oauth2-client-id ID
    --oauth2-client-secret-file secret.txt --oauth2-refresh-token-file token.txt
    """
    oauth2 = OAuth2Options(
        oauth2_token_url,
        oauth2_client_id,
        oauth2_client_secret_file,
        oauth2_refresh_token_file,
        oauth2_scope,
        oauth2_tenant,
    )
    sender = Sender(
        email=email,
        display_name=display_name or "",
        hourly_limit=hourly_limit,
        min_gap=to_duration(min_gap),
        max_in_flight=max_in_flight,
        sending_hours=to_sending_hours(sending_hours, sending_zone),
        smtp=_endpoint(
            smtp_host,
            smtp_port,
            smtp_security,
            smtp_username,
            smtp_password_file,
            ca_file=smtp_ca,
            preset=smtp_preset,
            oauth2=oauth2,
        ),
    )
    with connection("scheduler", server) as client:
        made = client.senders.CreateSender(pb.CreateSenderRequest(user_id=user, sender=sender))
    show(made, output)


@app.command()
def get(
    sender_id: SenderId,
    user: User = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show one sender."""
    with connection("scheduler", server) as client:
        found = client.senders.GetSender(pb.GetSenderRequest(sender_id=sender_id, user_id=user))
    show(found, output)


@app.command(name="list")
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
    page_size: PageSize = 0,
    page_token: PageToken = "",
    everything: AllPages = False,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List the senders of a user, the oldest first.

    $ outbox senders list --user demo
    """
    request = pb.ListSendersRequest(
        user_id=user,
        state=SenderState.ValueType(state or 0),
        page_size=page_size,
        page_token=page_token,
    )
    with connection("scheduler", server) as client:
        page = pages(client.senders.ListSenders, request, "senders", everything=everything)
    # The column is shown only if it is not empty, because it takes room from the others.
    cooling = any(sender.HasField("cooldown") for sender in page.senders)
    columns = (*_COLUMNS, "cooldown") if cooling else _COLUMNS
    show_list(page, "senders", columns, output, what="senders")


@app.command()
def update(
    sender_id: SenderId,
    *,
    user: User = "",
    email: Annotated[str | None, typer.Option("--email", help="The address in From.")] = None,
    display_name: DisplayName = None,
    hourly_limit: HourlyLimit = None,
    min_gap: MinGap = None,
    max_in_flight: MaxInFlight = None,
    sending_hours: HoursOption = None,
    sending_zone: ZoneOption = None,
    smtp_host: SmtpHost = None,
    smtp_port: SmtpPort = 0,
    smtp_security: Security = None,
    smtp_username: SmtpUsername = "",
    smtp_password_file: SmtpPasswordFile = None,
    smtp_ca: SmtpCa = None,
    smtp_preset: Preset = None,
    oauth2_token_url: TokenUrl = "",
    oauth2_client_id: ClientId = "",
    oauth2_client_secret_file: ClientSecretFile = None,
    oauth2_refresh_token_file: RefreshTokenFile = None,
    oauth2_scope: Scope = "",
    oauth2_tenant: Tenant = "",
    unset: Annotated[
        list[str] | None,
        typer.Option(
            "--unset", metavar="FIELD", help="Back to its default: min_gap, say. Repeatable."
        ),
    ] = None,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Change what is named, and nothing else; it holds from the next send on.

    $ outbox senders update SENDER_ID --hourly-limit 100 --unset min_gap

    $ outbox senders update SENDER_ID --unset sending_hours
    """
    oauth2 = OAuth2Options(
        oauth2_token_url,
        oauth2_client_id,
        oauth2_client_secret_file,
        oauth2_refresh_token_file,
        oauth2_scope,
        oauth2_tenant,
    )
    values = {
        "email": email,
        "display_name": display_name,
        "hourly_limit": hourly_limit,
        "min_gap": to_duration(min_gap),
        "max_in_flight": max_in_flight,
        "sending_hours": to_sending_hours(sending_hours, sending_zone),
        "smtp": _endpoint(
            smtp_host,
            smtp_port,
            smtp_security,
            smtp_username,
            smtp_password_file,
            ca_file=smtp_ca,
            preset=smtp_preset,
            oauth2=oauth2,
        ),
    }
    given = {name: value for name, value in values.items() if value is not None}
    paths = [*given, *(name.replace("-", "_") for name in unset or ())]
    if not paths:
        raise typer.BadParameter("name something to change, or --unset it")
    request = pb.UpdateSenderRequest(
        sender=Sender(sender_id=sender_id, **given),  # type: ignore[arg-type]  # by name
        update_mask=FieldMask(paths=paths),
        user_id=user,
    )
    with connection("scheduler", server) as client:
        changed = client.senders.UpdateSender(request)
    show(changed, output)


@app.command()
def delete(
    sender_id: SenderId,
    user: User = "",
    force: Annotated[
        bool, typer.Option("--force", help="Cancel what still waits; else that is an error.")
    ] = False,
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Delete a sender. Its jobs and batches stay readable."""
    with connection("scheduler", server) as client:
        answer = client.senders.DeleteSender(
            pb.DeleteSenderRequest(sender_id=sender_id, user_id=user, force=force)
        )
    show(answer, output)
    note(f"sender {sender_id} is deleted")


@app.command()
def pause(
    sender_id: SenderId,
    user: User = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Begin nothing more from this sender until it is resumed."""
    with connection("scheduler", server) as client:
        paused = client.senders.PauseSender(
            pb.PauseSenderRequest(sender_id=sender_id, user_id=user)
        )
    show(paused, output)


@app.command()
def resume(
    sender_id: SenderId,
    user: User = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Resume a paused sender, and end its cooldown. Its limits still hold."""
    with connection("scheduler", server) as client:
        resumed = client.senders.ResumeSender(
            pb.ResumeSenderRequest(sender_id=sender_id, user_id=user)
        )
    show(resumed, output)


@app.command()
def verify(
    sender_id: SenderId,
    user: User = "",
    recipient: Annotated[
        str,
        typer.Option(
            "--recipient", help="Address to name in RCPT (default: the sender's own address)."
        ),
    ] = "",
    server: Server = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Do what a send does, up to the recipient; no mail is sent. Exit code 1 means not ready.

    $ outbox senders verify 3
    """
    with connection("scheduler", server) as client:
        found = client.senders.VerifySender(
            pb.VerifySenderRequest(sender_id=sender_id, user_id=user, recipient=recipient)
        )
    show(found, output)
    if not found.ready:
        raise typer.Exit(1)


def _endpoint(
    host: str | None,
    port: int,
    security: int | None,
    username: str,
    password_file: Path | None,
    *,
    ca_file: Path | None,
    preset: int | None,
    oauth2: OAuth2Options,
) -> SmtpEndpoint | None:
    if host is None and preset is None:
        parts = (port, security is not None, username, password_file, ca_file, oauth2.given)
        if any(parts):
            raise typer.BadParameter(
                "an SMTP endpoint is replaced as a whole: give --smtp-host or --smtp-preset too"
            )
        return None
    password = text_or_file(None, password_file, "--smtp-password-file") or ""
    return SmtpEndpoint(
        host=host or "",
        port=port,
        security=SmtpSecurity.ValueType(security or 0),
        username=username,
        password=password.rstrip("\r\n"),
        ca_certificates=text_or_file(None, ca_file, "--smtp-ca") or "",
        oauth2=oauth2.to_credentials(),
        preset=SmtpPreset.ValueType(preset or 0),
    )
