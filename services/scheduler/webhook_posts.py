"""Posts signed requests to webhooks, over connections that `Egress` permits, within limits."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import urlsplit

import httpcore

from outbox_server.services.scheduler.webhooks import check_url, sign
from outbox_server.shared.egress import Egress, EgressRefused
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.permitted_network import NoConnection, PermittedNetwork
from outbox_server.shared.settings import Settings
from outbox_server.shared.tls import TlsContexts

# Limit of a whole request, from the look-up of the name to the head of the answer.
LIMIT: Final = timedelta(seconds=10)
_SUCCESS: Final = range(200, 300)
_MAX_ERROR: Final = 200
# Of the head of an answer. Its body is not read.
_MAX_HEAD_BYTES: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class WebhookMessage:
    """What to post, and where to."""

    url: str
    message_id: str
    kind: str
    data: dict[str, Any]
    user_id: str
    secret: str = field(repr=False)

    def body(self) -> bytes:
        """Return the body of the request."""
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        payload = {"type": self.kind, "timestamp": now, "data": self.data}
        return json.dumps(payload, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True, slots=True)
class PostResult:
    """What came back. `error` is empty after a success."""

    http_status: int | None
    error: str = ""


class WebhookPoster:
    """Posts messages. It follows no redirect and reads no body of an answer."""

    def __init__(self, egress: Egress, tls: TlsContexts, limit: timedelta = LIMIT) -> None:
        self._egress = egress
        self._tls = tls
        self._limit_s = limit.total_seconds()

    @classmethod
    def from_settings(cls, settings: Settings) -> WebhookPoster:
        """Read OUTBOX_WEBHOOK_ALLOW, and trust the machine's CAs and OUTBOX_SMTP_CA.

        Raises:
            ConfigurationError: one of them is malformed.
        """
        egress = Egress(settings.webhook_allow.split(","), setting="OUTBOX_WEBHOOK_ALLOW")
        return cls(egress, TlsContexts.from_settings(settings))

    def check_url(self, field: str, url: str) -> str:
        """Return the URL of a webhook.

        Raises:
            InvalidInput: WEBHOOK_URL_INVALID.
        """
        return check_url(field, url, self._egress.lists)

    async def close(self) -> None:
        """End the look-ups that are under way, before the event loop ends."""
        await self._egress.close()

    async def post(self, message: WebhookMessage) -> PostResult:
        """Post a message, and return what came back within the limit."""
        host = urlsplit(message.url).hostname or ""
        try:
            # The operator may have shortened OUTBOX_WEBHOOK_ALLOW.
            self.check_url("url", message.url)
            tls = await self._tls.context_for("")
            async with asyncio.timeout(self._limit_s):
                status = await self._exchange(message, tls)
        except TimeoutError:
            return PostResult(None, f"{host} gave no answer within {self._limit_s:g} s")
        except (EgressRefused, InvalidInput):
            return PostResult(None, f"{host} is not permitted; see OUTBOX_WEBHOOK_ALLOW")
        except httpcore.ProtocolError:
            return PostResult(None, f"{host} does not speak HTTP")
        except (OSError, httpcore.NetworkError, ssl.SSLError) as error:
            said = str(error) or type(error).__name__
            # A NoConnection names the host itself.
            where = "" if isinstance(error, NoConnection) else f"no connection to {host}: "
            return PostResult(None, f"{where}{said}"[:_MAX_ERROR])
        if status in _SUCCESS:
            return PostResult(status)
        return PostResult(status, f"{host} answered {status}")

    async def _exchange(self, message: WebhookMessage, tls: ssl.SSLContext) -> int:
        body, now = message.body(), int(time.time())
        headers = [
            (b"Content-Type", b"application/json"),
            (b"Connection", b"close"),
            (b"User-Agent", b"outbox"),
            (b"webhook-id", message.message_id.encode()),
            (b"webhook-timestamp", str(now).encode()),
            (
                b"webhook-signature",
                sign(message.secret, message.message_id, now, body).encode(),
            ),
        ]
        network = PermittedNetwork(self._egress, message.user_id, _MAX_HEAD_BYTES)
        async with (
            httpcore.AsyncConnectionPool(tls, network_backend=network) as pool,
            pool.stream("POST", message.url, headers=headers, content=body) as response,
        ):
            return response.status
