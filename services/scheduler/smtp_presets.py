"""The SMTP endpoints and OAuth 2.0 URLs of known providers. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Final

from outbox_server.shared.states import SmtpSecurity, requested_enum


class SmtpPreset(IntEnum):
    """A known provider, with its number in `outbox.v1`."""

    GMAIL = 1
    MICROSOFT365 = 2


@dataclass(frozen=True, slots=True)
class PresetProvider:
    """The values of a preset. A token URL may contain `{tenant}`."""

    host: str
    port: int
    security: SmtpSecurity
    token_url: str
    refresh_scope: str
    # Empty means that the provider has no client credentials for SMTP.
    client_credentials_scope: str = ""

    @property
    def has_tenants(self) -> bool:
        """Whether the token URL names a tenant."""
        return "{tenant}" in self.token_url


PROVIDERS: Final[Mapping[SmtpPreset, PresetProvider]] = MappingProxyType(
    {
        # https://developers.google.com/workspace/gmail/imap/xoauth2-protocol
        SmtpPreset.GMAIL: PresetProvider(
            host="smtp.gmail.com",
            port=587,
            security=SmtpSecurity.STARTTLS,
            token_url="https://oauth2.googleapis.com/token",  # noqa: S106 - an address
            refresh_scope="https://mail.google.com/",
        ),
        # https://learn.microsoft.com/exchange/client-developer/legacy-protocols/
        # how-to-authenticate-an-imap-pop-smtp-application-by-using-oauth
        SmtpPreset.MICROSOFT365: PresetProvider(
            host="smtp.office365.com",
            port=587,
            security=SmtpSecurity.STARTTLS,
            token_url="https://login.microsoftonline.com/{tenant}/oauth2/v2.0/token",  # noqa: S106
            refresh_scope="https://outlook.office.com/SMTP.Send offline_access",
            client_credentials_scope="https://outlook.office365.com/.default",
        ),
    }
)


def provider_of(field: str, preset: int) -> PresetProvider | None:
    """Return the provider of a preset; None if `preset` is 0.

    Raises:
        InvalidInput: SMTP_ENDPOINT_INVALID.
    """
    known = requested_enum(SmtpPreset, preset, field, reason="SMTP_ENDPOINT_INVALID")
    return None if known is None else PROVIDERS[known]


def complete_address(
    provider: PresetProvider | None, host: str, port: int, security: int
) -> tuple[str, int, int]:
    """Return host, port and security, with the provider's values where none were given.

    0 means that no port or no security was requested.
    """
    if provider is None:
        return host, port, security
    if not port and not security:
        # If one of them was given, the usual rule chooses the other: port 465 means TLS.
        port, security = provider.port, provider.security
    return host or provider.host, port, security
