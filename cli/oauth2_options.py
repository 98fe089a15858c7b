"""The command-line options of an endpoint that authenticates by OAuth 2.0."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from outbox.v1.sender_pb2 import OAuth2Credentials

from outbox_server.cli.options import text_or_file


@dataclass(frozen=True, slots=True, kw_only=True)
class OAuth2Options:
    """The options of an endpoint that authenticates by OAuth 2.0."""

    oauth2_token_url: Annotated[
        str,
        typer.Option("--oauth2-token-url", help="The provider's token endpoint, an https URL."),
    ] = ""
    oauth2_client_id: Annotated[
        str, typer.Option("--oauth2-client-id", help="The application's id at the provider.")
    ] = ""
    # Files, because every user of the machine can see the arguments of a process.
    oauth2_client_secret_file: Annotated[
        Path | None,
        typer.Option(
            "--oauth2-client-secret-file",
            help="File containing the application's secret; - is stdin.",
        ),
    ] = None
    oauth2_refresh_token_file: Annotated[
        Path | None,
        typer.Option(
            "--oauth2-refresh-token-file",
            help="File containing the mailbox's refresh token; - is stdin. Without it, client "
            "credentials are used.",
        ),
    ] = None
    oauth2_scope: Annotated[
        str, typer.Option("--oauth2-scope", help="Scopes to request, separated by spaces.")
    ] = ""
    oauth2_tenant: Annotated[
        str,
        typer.Option("--oauth2-tenant", help="The Microsoft 365 directory: its id or a domain."),
    ] = ""

    @property
    def given(self) -> bool:
        """Whether any of these options was given."""
        return self != OAuth2Options()

    def to_credentials(self) -> OAuth2Credentials | None:
        """Read the secrets and return the credentials; None if no option was given.

        Raises:
            typer.BadParameter: a file cannot be read, or both files are stdin.
        """
        if not self.given:
            return None
        if self.oauth2_client_secret_file == self.oauth2_refresh_token_file == Path("-"):
            raise typer.BadParameter(
                "--oauth2-client-secret-file and --oauth2-refresh-token-file cannot both be stdin"
            )
        return OAuth2Credentials(
            token_url=self.oauth2_token_url,
            client_id=self.oauth2_client_id,
            client_secret=_secret(self.oauth2_client_secret_file, "--oauth2-client-secret-file"),
            refresh_token=_secret(self.oauth2_refresh_token_file, "--oauth2-refresh-token-file"),
            scope=self.oauth2_scope,
            tenant=self.oauth2_tenant,
        )


def _secret(file: Path | None, flag: str) -> str:
    return (text_or_file(None, file, flag) or "").rstrip("\r\n")
