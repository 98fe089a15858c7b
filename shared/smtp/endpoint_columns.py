"""The columns of a sender's endpoint, for statements that read it together with other tables."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import select

from outbox_server.shared.database.models import OAuth2CredentialsRow, Sender
from outbox_server.shared.smtp.endpoint import StoredEndpoint
from outbox_server.shared.states import SmtpSecurity

# The `oauth2_credentials.id` of a sender, for a statement that selects from Sender.
OAUTH2_CREDENTIALS_ID: Final = (
    select(OAuth2CredentialsRow.id)
    .where(OAuth2CredentialsRow.sender_id == Sender.id)
    .correlate(Sender)
    .scalar_subquery()
)
# Statements that select from Sender use these. The prefix tells them from other columns.
ENDPOINT_COLUMNS: Final = (
    Sender.user_id.label("endpoint_user_id"),
    Sender.smtp_host.label("endpoint_host"),
    Sender.smtp_port.label("endpoint_port"),
    Sender.smtp_security.label("endpoint_security"),
    Sender.smtp_username.label("endpoint_username"),
    Sender.smtp_password.label("endpoint_password"),
    Sender.smtp_ca.label("endpoint_ca"),
    OAUTH2_CREDENTIALS_ID.label("endpoint_credentials_id"),
)


def endpoint_of(row: Any) -> StoredEndpoint:
    """Return the endpoint in a row that has ENDPOINT_COLUMNS."""
    security = row.endpoint_security
    return StoredEndpoint(
        user_id=row.endpoint_user_id,
        host=row.endpoint_host,
        port=row.endpoint_port,
        security=None if security is None else SmtpSecurity(security),
        username=row.endpoint_username,
        password=row.endpoint_password,
        ca=row.endpoint_ca,
        oauth2_credentials_id=row.endpoint_credentials_id,
    )
