"""Asks the endpoint of a sender whether mail could be handed in there. Sends nothing."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from services.scheduler.storage.senders import SenderEndpoint
from shared.egress import Egress
from shared.secrets import SecretBox
from shared.settings import Settings
from shared.smtp_session import Endpoint, Probe, probe, relay_of
from shared.states import SmtpSecurity

# Of the whole session: below the deadline of a call.
_LIMIT: Final = timedelta(seconds=20)


@dataclass(frozen=True, slots=True)
class Verification:
    """Who was asked, and what was found."""

    host: str
    port: int
    probe: Probe


class Verifier:
    """Knows what a dispatcher would do with a sender, and does it up to the mail."""

    def __init__(self, settings: Settings, secrets: SecretBox) -> None:
        self._settings = settings
        self._secrets = secrets
        self._egress = Egress.from_settings(settings)

    async def verify(self, sender: SenderEndpoint) -> Verification:
        """Open a session with the sender's endpoint, sign in, and end it."""
        endpoint = self._endpoint(sender)
        found = await probe(
            endpoint,
            step_limit=min(self._settings.smtp_timeout, _LIMIT),
            limit=_LIMIT,
            local_hostname=socket.gethostname(),
            egress=self._egress,
        )
        return Verification(endpoint.host, endpoint.port, found)

    def _endpoint(self, sender: SenderEndpoint) -> Endpoint:
        if self._settings.smtp_override or sender.host is None or sender.port is None:
            return relay_of(self._settings.smtp_url, plaintext=self._settings.plaintext)
        return Endpoint(
            sender.host,
            sender.port,
            sender.security or SmtpSecurity.STARTTLS,
            username=sender.username or "",
            password="" if sender.password is None else self._secrets.decrypt(sender.password),
        )
