"""SMTP endpoints: the server that a sender's mail goes to, and how to sign in to it."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from outbox_server.shared.callers import is_loopback_host
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.oauth2.credentials import OAuth2Ref
from outbox_server.shared.queue.circuit_keys import RELAY, CircuitKeys
from outbox_server.shared.redaction import redact
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import SmtpSecurity

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
    # CA certificates (PEM) that are trusted in addition to the usual ones. Part of equality, so a
    # sender that trusts fewer does not get a connection that was opened with more.
    ca: str = field(default="", repr=False)
    # The endpoint's key (`shared.queue.circuit_keys`), which depends on the user. Part of equality,
    # so users share connections to the relay only.
    circuit: str = RELAY
    # The user who chose the host: look-ups of names count per user. Empty for the relay.
    chosen_by: str = field(default="", compare=False)

    def shown(self, text: str) -> str:
        """Return a reply as people may read it and PostgreSQL can store it, shortened.

        Some servers quote the command that they refuse, and AUTH contains the password.
        """
        if self.password:
            # Parts of the password are hidden too: a server that quotes a long line often cuts it.
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


@dataclass(frozen=True, slots=True)
class StoredEndpoint:
    """The endpoint of a sender as PostgreSQL stores it. Without a host, it is the relay."""

    user_id: str
    host: str | None = None
    port: int | None = None
    security: SmtpSecurity | None = None
    username: str | None = None
    # Encrypted.
    password: bytes | None = field(default=None, repr=False)
    ca: str | None = None
    # `oauth2_credentials.id`. None means that there are no OAuth 2.0 credentials.
    oauth2_credentials_id: int | None = None


def resolve_endpoint(stored: StoredEndpoint, settings: Settings, secrets: SecretBox) -> Endpoint:
    """Return the server that a sender's mail goes to: its own, or the operator's relay.

    Raises:
        ConfigurationError: OUTBOX_SMTP_URL is invalid (see `relay_of`).
        FailedPrecondition: no key decrypts the password.
    """
    if settings.smtp_override or stored.host is None or stored.port is None:
        return relay_of(settings.smtp_url, plaintext=settings.plaintext)
    circuit = CircuitKeys(secrets, override=False).of_sender(
        stored.user_id,
        stored.host,
        stored.port,
        stored.security,
        stored.username,
        password=stored.password,
        oauth2_credentials_id=stored.oauth2_credentials_id,
    )
    oauth2 = stored.oauth2_credentials_id
    return Endpoint(
        host=stored.host,
        port=stored.port,
        security=stored.security or SmtpSecurity.STARTTLS,
        username=stored.username or "",
        password="" if stored.password is None else secrets.decrypt(stored.password),
        ca=stored.ca or "",
        oauth2=None if oauth2 is None else OAuth2Ref(oauth2),
        circuit=circuit,
        chosen_by=stored.user_id,
    )


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
            f"OUTBOX_SMTP_URL: its password would be sent to {host} unencrypted; use "
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
