"""Requests access tokens over HTTPS, and connects only to addresses that `Egress` permits."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import quote_plus, urlencode, urlsplit

import httpcore

from outbox_server.shared.egress import Egress, EgressRefused, text_of
from outbox_server.shared.oauth2.token_answers import (
    Failure,
    Grant,
    clean,
    outage,
    read_answer,
    refusal,
)
from outbox_server.shared.permitted_network import PermittedNetwork
from outbox_server.shared.settings import Settings
from outbox_server.shared.tls import TlsContexts

# Limit of the whole exchange, from the look-up of the name to the last byte.
LIMIT: Final = timedelta(seconds=10)
MAX_ANSWER_BYTES: Final = 64 * 1024
# The maximum number of bytes of the head of an answer, and of the lengths of its chunks.
_MAX_HEAD_BYTES: Final = 32 * 1024


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """One request for an access token. Without a refresh token it uses client credentials."""

    token_url: str
    client_id: str
    scope: str
    client_secret: str = field(default="", repr=False)
    refresh_token: str = field(default="", repr=False)
    # The user who chose the URL.
    user_id: str = ""

    def form(self) -> bytes:
        """Return the body of the request (RFC 6749, sections 2.3.1, 4.4.2 and 6)."""
        fields = {"grant_type": "client_credentials", "client_id": self.client_id}
        if self.refresh_token:
            fields |= {"grant_type": "refresh_token", "refresh_token": self.refresh_token}
        if self.client_secret:
            fields["client_secret"] = self.client_secret
        if self.scope:
            fields["scope"] = self.scope
        return urlencode(fields).encode()

    def secrets(self) -> tuple[str, ...]:
        """Return the secrets that no text may contain, unchanged and as the form encodes them."""
        kept = [secret for secret in (self.client_secret, self.refresh_token) if secret]
        return tuple(dict.fromkeys((*kept, *map(quote_plus, kept))))


class TokenClient:
    """Sends requests to token endpoints. It keeps no connection, as tokens last about an hour."""

    def __init__(self, egress: Egress, tls: TlsContexts, limit: timedelta = LIMIT) -> None:
        self._egress = egress
        self._tls = tls
        self._limit = limit

    @classmethod
    def from_settings(cls, settings: Settings, egress: Egress) -> TokenClient:
        """Trust the machine's CAs and OUTBOX_SMTP_CA.

        Raises:
            ConfigurationError: OUTBOX_SMTP_CA cannot be read.
        """
        return cls(egress, TlsContexts.from_settings(settings))

    async def request(self, wanted: TokenRequest) -> Grant | Failure:
        """Return an access token or the reason why there is none, within the limit."""
        host = urlsplit(wanted.token_url).hostname or ""
        # Built at the first request, because it takes tens of milliseconds, and most installations
        # have no sender with OAuth 2.0.
        tls = await self._tls.context_for("")
        try:
            async with asyncio.timeout(self._limit.total_seconds()):
                return await self._exchange(wanted, tls)
        except TimeoutError:
            seconds = f"{self._limit.total_seconds():g} s"
            return outage(f"{host} gave no complete answer within {seconds}")
        except EgressRefused as error:
            return refusal(str(error))
        except httpcore.ProtocolError:
            # The error's text is not shown: it quotes the server, which may be another service, or
            # may quote a secret.
            return outage(f"no answer from {host}: it does not speak HTTP")
        except (OSError, httpcore.NetworkError) as error:
            said = clean(text_of(error), wanted.secrets()) or type(error).__name__
            return outage(f"no answer from {host}: {said}")

    async def _exchange(self, wanted: TokenRequest, tls: ssl.SSLContext) -> Grant | Failure:
        headers = [
            (b"Accept", b"application/json"),
            # Ask for no compression, so that the limit of the size holds.
            (b"Accept-Encoding", b"identity"),
            (b"Content-Type", b"application/x-www-form-urlencoded"),
            (b"Connection", b"close"),
            (b"User-Agent", b"outbox"),
        ]
        network = PermittedNetwork(self._egress, wanted.user_id, MAX_ANSWER_BYTES + _MAX_HEAD_BYTES)
        async with (
            httpcore.AsyncConnectionPool(tls, network_backend=network) as pool,
            pool.stream(
                "POST", wanted.token_url, headers=headers, content=wanted.form()
            ) as response,
        ):
            answer = bytearray()
            async for chunk in response.aiter_stream():
                answer += chunk
                if len(answer) > MAX_ANSWER_BYTES:
                    return outage(f"the token URL answered more than {MAX_ANSWER_BYTES} bytes")
            waits = [value for name, value in response.headers if name.lower() == b"retry-after"]
            return read_answer(
                response.status,
                bytes(answer),
                retry_after=waits[0].decode("latin-1") if waits else None,
                now=datetime.now(UTC),
                secrets=wanted.secrets(),
            )
