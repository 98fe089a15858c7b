"""Posts signed requests to webhooks, over connections that `Egress` permits, within limits."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import urlsplit

import httpcore

from outbox_server.services.scheduler.webhooks import check_url, sign
from outbox_server.shared.egress import Egress, EgressRefused, text_of
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.permitted_network import NoConnection, PermittedNetwork
from outbox_server.shared.settings import Settings
from outbox_server.shared.tls import TlsContexts

# Limit of a whole request, from the look-up of the name to the head of the answer.
LIMIT: Final = timedelta(seconds=10)
_SUCCESS: Final = range(200, 300)
_MAX_ERROR: Final = 200
# The limits of an answer's body. It is read only to keep the connection, for at most this long.
_MAX_ANSWER_BYTES: Final = 16 * 1024
_BODY_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class WebhookMessage:
    """What to post, and where to."""

    url: str
    message_id: str
    kind: str
    data: dict[str, Any]
    user_id: str
    # The present secret comes first. Each of them signs.
    secrets: Sequence[str] = field(repr=False)

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
    """Posts messages. It follows no redirect and uses no body of an answer."""

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
        """Post one message, and return what came back within the limit."""
        async with self.connection(message.user_id) as connection:
            return await connection.post(message)

    @asynccontextmanager
    async def connection(self, user_id: str) -> AsyncIterator[WebhookConnection]:
        """Yield a connection for some messages of one user to one URL. It is opened when needed."""
        tls = await self._tls.context_for("")
        opened = WebhookConnection(self._egress, tls, user_id, self._limit_s)
        try:
            yield opened
        finally:
            await opened.close()


class WebhookConnection:
    """A connection that is kept open between the messages to one URL."""

    def __init__(self, egress: Egress, tls: ssl.SSLContext, user_id: str, limit_s: float) -> None:
        self._egress = egress
        self._network = PermittedNetwork(egress, user_id, _MAX_ANSWER_BYTES)
        self._tls = tls
        self._limit_s = limit_s
        self._pool = self._new_pool()
        # Whether the pool may have a connection that the server has closed meanwhile.
        self._used = False

    def _new_pool(self) -> httpcore.AsyncConnectionPool:
        return httpcore.AsyncConnectionPool(
            self._tls, network_backend=self._network, max_connections=1
        )

    async def close(self) -> None:
        """Close the connection."""
        await self._pool.aclose()

    async def post(self, message: WebhookMessage, *, more: bool = False) -> PostResult:
        """Post a message, and return what came back within the limit.

        `more` says that another message follows, for which the connection is kept.
        """
        host = urlsplit(message.url).hostname or ""
        try:
            # The operator may have shortened OUTBOX_WEBHOOK_ALLOW.
            check_url("url", message.url, self._egress.lists)
            status = await self._exchange_again_if_closed(message, more=more)
        except TimeoutError:
            return PostResult(None, f"{host} gave no answer within {self._limit_s:g} s")
        except (EgressRefused, InvalidInput):
            return PostResult(None, f"{host} is not permitted; see OUTBOX_WEBHOOK_ALLOW")
        except httpcore.ProtocolError:
            return PostResult(None, f"{host} does not speak HTTP")
        except (OSError, httpcore.NetworkError, ssl.SSLError) as error:
            said = text_of(error) or type(error).__name__
            # The text of a NoConnection already names the host.
            where = "" if isinstance(error, NoConnection) else f"no connection to {host}: "
            return PostResult(None, f"{where}{said}"[:_MAX_ERROR])
        if status in _SUCCESS:
            return PostResult(status)
        return PostResult(status, f"{host} answered {status}")

    async def _exchange_again_if_closed(self, message: WebhookMessage, *, more: bool) -> int:
        used, self._used = self._used, True
        try:
            return await self._exchange(message, more=more)
        except (httpcore.ProtocolError, httpcore.NetworkError):
            if not used:
                raise
        # The server may close a connection that it has kept at any time.
        await self._pool.aclose()
        self._pool = self._new_pool()
        return await self._exchange(message, more=more)

    async def _exchange(self, message: WebhookMessage, *, more: bool) -> int:
        body, now = message.body(), int(time.time())
        headers = [
            (b"Content-Type", b"application/json"),
            (b"User-Agent", b"outbox"),
            (b"webhook-id", message.message_id.encode()),
            (b"webhook-timestamp", str(now).encode()),
            (
                b"webhook-signature",
                sign(message.secrets, message.message_id, now, body).encode(),
            ),
        ]
        if not more:
            headers.append((b"Connection", b"close"))
        self._network.renew()
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(self._limit_s):
                request = self._pool.stream("POST", message.url, headers=headers, content=body)
                response = await stack.enter_async_context(request)
            if more:
                await _read_body(response)
            return response.status


async def _read_body(response: httpcore.Response) -> None:
    """Read the body of an answer, so that the connection can be kept.

    If it is too long or too slow, the connection is closed at the end of the request.
    """
    with suppress(TimeoutError, httpcore.ProtocolError, httpcore.NetworkError, OSError):
        async with asyncio.timeout(_BODY_S):
            async for _ in response.aiter_stream():
                pass
