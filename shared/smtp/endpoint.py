"""SMTP endpoints: the server that a sender's mail goes to, and how to sign in to it."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from shared.auth import is_loopback_host
from shared.endpoints import RELAY
from shared.errors import ConfigurationError
from shared.oauth2.credentials import OAuth2Ref
from shared.redaction import redact
from shared.states import SmtpSecurity

_SCHEMES = {
    "smtp": (SmtpSecurity.NONE, 25),
    "smtps": (SmtpSecurity.TLS, 465),
    "smtp+starttls": (SmtpSecurity.STARTTLS, 587),
}
# Characters of a reply that are kept.
_MAX_REPLY_TEXT = 500


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The server that a sender's mail goes to, and how to sign in to it."""

    host: str
    port: int
    security: SmtpSecurity
    username: str = ""
    password: str = field(default="", repr=False)
    # Credentials that take the place of a password. A TokenProvider gives the access tokens.
    oauth2: OAuth2Ref | None = None
    # True for the operator's relay, which may have any address. The address of every other endpoint
    # is checked, because a user chose it. Part of equality, so that a user who names the relay does
    # not get a connection that was opened without the check.
    operators: bool = False
    # CA certificates (PEM) that are trusted beside the usual ones. Part of equality, so that a
    # sender that trusts fewer does not get a connection that was opened with more.
    ca: str = field(default="", repr=False)
    # The endpoint's name in Redis (`shared.endpoints`).
    circuit: str = field(default=RELAY, compare=False)

    def shown(self, text: str) -> str:
        """Return a reply as people may read it and PostgreSQL can store it, shortened.

        Some servers quote the command that they refuse, and AUTH contains the password.
        """
        if self.password:
            # Also a part of it: a server that quotes a long line often cuts it.
            text = redact(text, self._secrets(), "[password]")
        return text[:_MAX_REPLY_TEXT].replace("\x00", "").encode("utf-8", "replace").decode()

    def _secrets(self) -> tuple[str, ...]:
        """Return the password as it is, and as AUTH PLAIN and AUTH LOGIN send it."""
        if not self.password:
            return ()
        plain, login = (
            b64encode(sent.encode()).decode()
            for sent in (f"\0{self.username}\0{self.password}", self.password)
        )
        return (plain, login, self.password)


def relay_of(url: str, *, plaintext: bool = False) -> Endpoint:
    """Return the endpoint that OUTBOX_SMTP_URL names.

    Raises:
        ConfigurationError: the URL is not an smtp://, smtps:// or smtp+starttls:// URL, or its
            password would be sent unencrypted and `plaintext` (OUTBOX_PLAINTEXT) is not set.
    """
    try:
        parts = urlsplit(url)
        security, port = _SCHEMES[parts.scheme]
        host, given_port = parts.hostname, parts.port
    except (KeyError, ValueError):
        host, given_port, security, port = None, None, SmtpSecurity.NONE, 0
    if not host:
        # The message does not quote the URL, because it may contain a password.
        raise ConfigurationError(
            "OUTBOX_SMTP_URL: must be smtp://host:port, smtps://host:port or "
            "smtp+starttls://host:port, with user:password@ before the host where needed"
        )
    if (
        parts.password
        and security is SmtpSecurity.NONE
        and not (plaintext or is_loopback_host(host))
    ):
        raise ConfigurationError(
            f"OUTBOX_SMTP_URL: its password would be sent to {host} in clear; use "
            "smtp+starttls:// or smtps://, or set OUTBOX_PLAINTEXT=true"
        )
    return Endpoint(
        host=host,
        port=given_port or port,
        security=security,
        username=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        operators=True,
    )
