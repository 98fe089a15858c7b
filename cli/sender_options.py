"""The command-line options of a sender, for the commands that create and change one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from outbox.v1.sender_pb2 import SmtpEndpoint, SmtpPreset, SmtpSecurity

from outbox_server.cli.oauth2_options import OAuth2Options
from outbox_server.cli.options import (
    duration_option,
    enum_reader,
    read_int32,
    text_or_file,
    to_duration,
)
from outbox_server.cli.sending_hours import HoursOption, ZoneOption, to_sending_hours


@dataclass(frozen=True, slots=True, kw_only=True)
class SmtpOptions:
    """The options of a sender's endpoint."""

    smtp_host: Annotated[
        str | None,
        typer.Option(
            "--smtp-host", help="SMTP server of the sender (default: the relay of OUTBOX_SMTP_URL)."
        ),
    ] = None
    smtp_port: Annotated[
        int,
        typer.Option(
            "--smtp-port",
            parser=read_int32,
            metavar="N",
            show_default=False,
            help="SMTP port (default: 465 with tls, otherwise 587).",
        ),
    ] = 0
    smtp_security: Annotated[
        int | None,
        typer.Option(
            "--smtp-security",
            parser=enum_reader(SmtpSecurity, "SMTP_SECURITY_"),
            metavar="none|starttls|tls",
            help="Encryption (default: tls for port 465, otherwise starttls).",
        ),
    ] = None
    smtp_username: Annotated[str, typer.Option("--smtp-username", help="SMTP user name.")] = ""
    # A file, because every user of the machine can see the arguments of a process.
    smtp_password_file: Annotated[
        Path | None,
        typer.Option(
            "--smtp-password-file", help="File containing only the SMTP password; - is stdin."
        ),
    ] = None
    smtp_ca: Annotated[
        Path | None,
        typer.Option(
            "--smtp-ca", help="PEM file of a private CA that may sign the server's certificate."
        ),
    ] = None
    smtp_preset: Annotated[
        int | None,
        typer.Option(
            "--smtp-preset",
            parser=enum_reader(SmtpPreset, "SMTP_PRESET_"),
            metavar="gmail|microsoft365",
            help="Provider whose host, port, security, token URL and scope are the defaults.",
        ),
    ] = None
    oauth2: OAuth2Options

    def to_endpoint(self) -> SmtpEndpoint | None:
        """Read the secrets and return the endpoint; None if no option was given.

        Raises:
            typer.BadParameter: a file cannot be read, or there is neither a host nor a preset.
        """
        if self.smtp_host is None and self.smtp_preset is None:
            if self != SmtpOptions(oauth2=OAuth2Options()):
                raise typer.BadParameter(
                    "an SMTP endpoint is set as a whole: also give --smtp-host or --smtp-preset"
                )
            return None
        password = text_or_file(None, self.smtp_password_file, "--smtp-password-file") or ""
        return SmtpEndpoint(
            host=self.smtp_host or "",
            port=self.smtp_port,
            security=SmtpSecurity.ValueType(self.smtp_security or 0),
            username=self.smtp_username,
            password=password.rstrip("\r\n"),
            ca_certificates=text_or_file(None, self.smtp_ca, "--smtp-ca") or "",
            oauth2=self.oauth2.to_credentials(),
            preset=SmtpPreset.ValueType(self.smtp_preset or 0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SenderOptions:
    """The options of a sender, except its address."""

    display_name: Annotated[
        str | None, typer.Option("--display-name", help="Name shown in From before the address.")
    ] = None
    hourly_limit: Annotated[
        int | None,
        typer.Option(
            "--hourly-limit",
            parser=read_int32,
            metavar="N",
            help="Maximum sends in any trailing hour: 1 to 1000000.",
        ),
    ] = None
    min_gap: Annotated[
        timedelta | None,
        duration_option(
            "--min-gap", "Minimum time from the end of a send to the start of the next, such as 2s."
        ),
    ] = None
    max_in_flight: Annotated[
        int | None,
        typer.Option(
            "--max-in-flight",
            parser=read_int32,
            metavar="N",
            help="Maximum concurrent sends; applies only without a gap.",
        ),
    ] = None
    sending_hours: HoursOption = None
    sending_zone: ZoneOption = None
    smtp: SmtpOptions

    def to_fields(self) -> dict[str, Any]:
        """Return the given options as fields of a `Sender`.

        Raises:
            typer.BadParameter: a file cannot be read, or options that belong together are not
                given together.
        """
        fields = {
            "display_name": self.display_name,
            "hourly_limit": self.hourly_limit,
            "min_gap": to_duration(self.min_gap),
            "max_in_flight": self.max_in_flight,
            "sending_hours": to_sending_hours(self.sending_hours, self.sending_zone),
            "smtp": self.smtp.to_endpoint(),
        }
        return {name: value for name, value in fields.items() if value is not None}
