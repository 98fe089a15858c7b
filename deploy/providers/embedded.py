"""The simulated provider of an embedded stack: one account, TLS, and the stack's Maildir."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from outbox_server.deploy.certificates import self_signed, server_context
from outbox_server.deploy.mail_store import MailStore
from outbox_server.deploy.providers.profile import Profile
from outbox_server.deploy.providers.sasl import Account
from outbox_server.deploy.providers.server import Provider

# The only account. It is not secret: the server listens on loopback, and delivers nothing.
USER: Final = "outbox"
PASSWORD: Final = "outbox"  # noqa: S105
# A new certificate is made at each start.
_CERTIFICATE_LASTS: Final = timedelta(days=365)


@dataclass(frozen=True, slots=True)
class EmbeddedProvider:
    """A provider, its Maildir, and the certificate that its clients must trust."""

    server: Provider
    certificate: Path
    store: MailStore

    @property
    def url(self) -> str:
        """The value for OUTBOX_SMTP_URL."""
        return self.server.url(USER if self.server.profile.requires_auth else "")


def embedded_provider(
    profile: Profile, *, folder: Path, maildir: Path, port: int | None
) -> EmbeddedProvider:
    """Return a provider that is not started yet. Its certificate is written to `folder`."""
    certificate = self_signed(folder, until=_CERTIFICATE_LASTS)
    store = MailStore(maildir)
    server = Provider(
        profile,
        port=port,
        accounts={USER: Account(PASSWORD)},
        tls=server_context(certificate),
        store=store,
    )
    return EmbeddedProvider(server, certificate.public, store)
