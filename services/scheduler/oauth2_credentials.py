"""Checks the OAuth 2.0 credentials of an endpoint, and fills in the values of a preset. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from outbox_server.services.scheduler.senders import check_host
from outbox_server.services.scheduler.smtp_presets import PresetProvider
from outbox_server.shared import bounds
from outbox_server.shared.errors import InvalidInput, Violations
from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.states import SmtpSecurity

_DEFAULT_TENANT: Final = "common"
# These names mean any directory. Client credentials need a single directory.
_SHARED_TENANTS: Final = frozenset({"common", "organizations", "consumers"})
_TENANT: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,253}[A-Za-z0-9])?", re.ASCII)
_TEXTS: Final = {
    "client_id": bounds.OAUTH2_CLIENT_ID,
    "client_secret": bounds.OAUTH2_CLIENT_SECRET,
    "refresh_token": bounds.OAUTH2_REFRESH_TOKEN,
    "scope": bounds.OAUTH2_SCOPE,
    "tenant": bounds.OAUTH2_TENANT,
}
_VISIBLE: Final = re.compile(r"[\x21-\x7e]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class OAuth2Credentials:
    """Credentials for access tokens. The secrets are not encrypted yet; SecretBox encrypts them."""

    token_url: str
    client_id: str
    client_secret: str = field(repr=False)
    refresh_token: str = field(repr=False)
    scope: str
    tenant: str = ""


def check_credentials(
    field: str, asked: OAuth2Credentials, endpoint: Endpoint | None, provider: PresetProvider | None
) -> OAuth2Credentials:
    """Return the credentials, with the values of a preset where none were given.

    `field` is the path of the endpoint in the request. `provider` is None without a preset. An
    `endpoint` of None means that the endpoint is invalid: then the credentials are checked alone.

    Raises:
        InvalidInput: SMTP_ENDPOINT_INVALID.
    """
    path = f"{field}.oauth2"
    wrong = Violations()
    for name, limit in _TEXTS.items():
        with wrong:
            limit.check(f"{path}.{name}", getattr(asked, name))
    with wrong:
        if asked.token_url:
            _check_token_url(f"{path}.token_url", asked.token_url)
    with wrong:
        if endpoint is not None:
            _check_endpoint(field, endpoint)
    wrong.raise_any()
    return asked if endpoint is None else _completed(path, asked, provider)


def _completed(
    path: str, asked: OAuth2Credentials, provider: PresetProvider | None
) -> OAuth2Credentials:
    if not (asked.refresh_token or asked.client_secret):
        raise _invalid(
            path,
            "needs a refresh_token, or a client_secret for client credentials; "
            "an update of the endpoint must contain its secrets too",
        )
    if not asked.refresh_token and provider and not provider.client_credentials_scope:
        raise _invalid(
            f"{path}.refresh_token",
            "must be set: this provider does not offer client credentials for SMTP",
        )
    token_url = _token_url(path, asked, provider)
    scope = asked.scope
    if not scope and provider is not None:
        by_refresh = bool(asked.refresh_token)
        scope = provider.refresh_scope if by_refresh else provider.client_credentials_scope
    return OAuth2Credentials(
        token_url, asked.client_id, asked.client_secret, asked.refresh_token, scope
    )


def _check_endpoint(field: str, endpoint: Endpoint) -> None:
    if endpoint.password:
        raise _invalid(f"{field}.oauth2", "must not be set together with `password`")
    if not endpoint.username:
        raise _invalid(f"{field}.username", "must be the mailbox that oauth2 signs in to")
    if endpoint.security is SmtpSecurity.NONE:
        raise _invalid(f"{field}.security", "must be STARTTLS or TLS if `oauth2` is set")


def _token_url(path: str, asked: OAuth2Credentials, provider: PresetProvider | None) -> str:
    if asked.tenant and (asked.token_url or provider is None or not provider.has_tenants):
        raise _invalid(
            f"{path}.tenant",
            "may be set only with SMTP_PRESET_MICROSOFT365 and without a token_url",
        )
    if not asked.token_url and provider is not None:
        return provider.token_url.replace("{tenant}", _tenant(path, asked, provider))
    return _check_token_url(f"{path}.token_url", asked.token_url)


def _tenant(path: str, asked: OAuth2Credentials, provider: PresetProvider) -> str:
    if not provider.has_tenants:
        return ""
    tenant = asked.tenant or _DEFAULT_TENANT
    if not asked.refresh_token and tenant.lower() in _SHARED_TENANTS:
        raise _invalid(
            f"{path}.tenant",
            "must be the id or a domain of one directory, because client credentials belong to one "
            "(they are used if there is no refresh_token)",
        )
    if not _TENANT.fullmatch(tenant):
        raise _invalid(
            f"{path}.tenant",
            f"{tenant[:80]!r} is not a directory; use its id or a domain such as "
            "example.onmicrosoft.com",
        )
    return tenant


def _check_token_url(field: str, text: str) -> str:
    """Return the URL. Its address is checked later, when a connection is opened.

    Raises:
        InvalidInput: SMTP_ENDPOINT_INVALID.
    """
    bounds.OAUTH2_TOKEN_URL.check(field, text)
    if not _VISIBLE.fullmatch(text):
        raise _invalid(field, "must consist of visible ASCII characters")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme != "https" or not host or port == 0:
        # The message does not quote the text, because it may contain a secret.
        raise _invalid(field, "must be an https URL, such as https://oauth2.googleapis.com/token")
    if "@" in parts.netloc or "#" in text:
        raise _invalid(field, "must not contain a user name or a fragment (#)")
    check_host(field, host)
    return text


def _invalid(field: str, description: str) -> InvalidInput:
    return InvalidInput.field(field, description, reason="SMTP_ENDPOINT_INVALID")
