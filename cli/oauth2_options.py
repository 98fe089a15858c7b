"""The command-line options for an endpoint that signs in by OAuth 2.0."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from outbox.v1.sender_pb2 import OAuth2Credentials, SmtpPreset

from cli.options import enum_reader, text_or_file

Preset = Annotated[
    int | None,
    typer.Option(
        "--smtp-preset",
        parser=enum_reader(SmtpPreset, "SMTP_PRESET_"),
        metavar="gmail|microsoft365",
        help="Use this provider's host, port, security, token URL and scope where none are given.",
    ),
]
TokenUrl = Annotated[
    str,
    typer.Option("--oauth2-token-url", help="The provider's token endpoint, an https URL."),
]
ClientId = Annotated[
    str, typer.Option("--oauth2-client-id", help="The application's id at the provider.")
]
# Files, because every user of the machine can see the arguments of a process.
ClientSecretFile = Annotated[
    Path | None,
    typer.Option(
        "--oauth2-client-secret-file", help="File containing the application's secret; - is stdin."
    ),
]
RefreshTokenFile = Annotated[
    Path | None,
    typer.Option(
        "--oauth2-refresh-token-file",
        help="File containing the mailbox's refresh token; - is stdin. Without it, client "
        "credentials are used.",
    ),
]
Scope = Annotated[
    str, typer.Option("--oauth2-scope", help="Scopes to ask for, separated by spaces.")
]
Tenant = Annotated[
    str,
    typer.Option("--oauth2-tenant", help="The Microsoft 365 directory: its id or a domain."),
]


@dataclass(frozen=True, slots=True)
class OAuth2Options:
    """The options of both commands that write an endpoint."""

    token_url: str
    client_id: str
    client_secret_file: Path | None
    refresh_token_file: Path | None
    scope: str
    tenant: str

    @property
    def given(self) -> bool:
        """Whether any of them was given."""
        return any((self.token_url, self.client_id, self.scope, self.tenant)) or (
            self.client_secret_file is not None or self.refresh_token_file is not None
        )

    def to_credentials(self) -> OAuth2Credentials | None:
        """Read the secrets and return the credentials; None if no option was given.

        Raises:
            typer.BadParameter: a file cannot be read, or both files are stdin.
        """
        if not self.given:
            return None
        if self.client_secret_file == self.refresh_token_file == Path("-"):
            raise typer.BadParameter(
                "--oauth2-client-secret-file and --oauth2-refresh-token-file cannot both be stdin"
            )
        return OAuth2Credentials(
            token_url=self.token_url,
            client_id=self.client_id,
            client_secret=_secret(self.client_secret_file, "--oauth2-client-secret-file"),
            refresh_token=_secret(self.refresh_token_file, "--oauth2-refresh-token-file"),
            scope=self.scope,
            tenant=self.tenant,
        )


def _secret(file: Path | None, flag: str) -> str:
    return (text_or_file(None, file, flag) or "").rstrip("\r\n")
