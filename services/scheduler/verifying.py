"""Checks that the endpoint of a sender accepts mail, without sending any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from outbox_server.shared.egress import Egress
from outbox_server.shared.errors import ResourceExhausted
from outbox_server.shared.fair_shares import FairShares
from outbox_server.shared.oauth2.credentials import TokenProvider
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.settings import Settings
from outbox_server.shared.smtp.addresses import envelope_address
from outbox_server.shared.smtp.endpoint import StoredEndpoint, resolve_endpoint
from outbox_server.shared.smtp.helo import helo_name
from outbox_server.shared.smtp.limits import PhaseLimits
from outbox_server.shared.smtp.probe import Probe, Prober
from outbox_server.shared.smtp.replies import ReplyRules
from outbox_server.shared.tls import TlsContexts

# The limit of the whole session in seconds, below the deadline of a call.
_LIMIT: Final = 20.0
# A session with a silent endpoint lasts that long. So verifications do not count among the calls
# of the server, and a user gets a few of them at a time.
_AT_ONCE: Final = 32
_WAITING: Final = 64
AT_ONCE_PER_USER: Final = 4
_RETRY_AFTER: Final = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class Verification:
    """The endpoint that was checked, and the result."""

    host: str
    port: int
    probe: Probe
    # Whether the endpoint is the operator's relay.
    operators: bool


class Verifier:
    """Opens the session that a dispatcher would open for a sender, and goes as far as RCPT."""

    def __init__(
        self, settings: Settings, secrets: SecretBox, tokens: TokenProvider, egress: Egress
    ) -> None:
        # The places of VerifySender.
        self.shares = FairShares("verifications", _AT_ONCE, waiting=_WAITING)
        self._under_way: Counter[str] = Counter()
        self._tokens = tokens
        self._settings = settings
        self._secrets = secrets
        self._limits = PhaseLimits.from_settings(settings)
        self._rules = ReplyRules.load(settings.reply_rules)
        self._helo = helo_name(settings)
        # Opens every connection to an endpoint that a user chose.
        self.egress = egress

    @contextmanager
    def turn_of(self, user_id: str | None) -> Iterator[None]:
        """Hold a place for a verification of a user. None means a caller who may act for all users.

        Raises:
            ResourceExhausted: TOO_MANY_CALLS: the user has too many under way.
        """
        if user_id is None:
            yield
            return
        if self._under_way[user_id] >= AT_ONCE_PER_USER:
            raise ResourceExhausted(
                f"{AT_ONCE_PER_USER} verifications of the user {user_id} are under way; try again "
                "a little later",
                reason="TOO_MANY_CALLS",
                metadata={
                    "what": "verifications",
                    "limit_of": f"user {user_id}",
                    "current": str(AT_ONCE_PER_USER),
                    "at_once": str(AT_ONCE_PER_USER),
                },
                retry_after=_RETRY_AFTER,
            )
        self._under_way[user_id] += 1
        try:
            yield
        finally:
            self._under_way[user_id] -= 1
            if not self._under_way[user_id]:
                del self._under_way[user_id]

    async def verify(self, stored: StoredEndpoint, sender: str, recipient: str) -> Verification:
        """Open a session with an endpoint, go as far as RCPT, and end it.

        `sender` is the sender's address. An empty `recipient` means the same address.

        Raises:
            ValueError: `recipient` is not a mail address.
        """
        endpoint = resolve_endpoint(stored, self._settings, self._secrets)
        prober = Prober(
            limits=self._limits,
            limit=_LIMIT,
            rules=self._rules,
            helo=self._helo,
            egress=self.egress,
            # OUTBOX_SMTP_CA is read again, so that the result holds for the present file.
            tls=TlsContexts.from_settings(self._settings),
            tokens=self._tokens,
        )
        mail_from = envelope_address(sender)
        rcpt_to = envelope_address(recipient) if recipient else mail_from
        probe = await prober.probe(endpoint, mail_from, rcpt_to)
        return Verification(endpoint.host, endpoint.port, probe, endpoint.operators)
