"""Serves metrics over HTTP, from the event loop of the process.

The server of prometheus_client has a thread for each connection and no time limits. And the reads
from the stores at a scrape need the event loop anyway. A request here has one answer on a
connection of its own, within bounds.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Final

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from outbox_server.shared.listening import cannot_bind, check_listen_address, host_and_port

VARIABLE: Final = "OUTBOX_METRICS_LISTEN"
_MAX_HEAD_BYTES: Final = 8 * 1024
# The maximum number of connections at once, in all and of one address. Further ones are closed
# without an answer. A scraper needs one, and one address cannot use up the connections of all.
CONNECTIONS: Final = 64
CONNECTIONS_OF_ONE_ADDRESS: Final = 8
_LIMIT: Final = timedelta(seconds=10)
# How long a scrape waits for the stores. Prometheus gives up after 10 s by default.
_REFRESH_LIMIT: Final = timedelta(seconds=2)
_log = structlog.get_logger("outbox.metrics")


class MetricsEndpoint:
    """Answers `GET /metrics` at `listen`. Each of `refresh` is awaited before an answer."""

    def __init__(self, listen: str, registry: CollectorRegistry) -> None:
        """Check the address.

        Raises:
            ConfigurationError: OUTBOX_METRICS_LISTEN is not `host:port`.
        """
        check_listen_address(VARIABLE, listen, example="0.0.0.0:9464")
        self._listen = listen
        self._registry = registry
        self._server: asyncio.Server | None = None
        self._connections: Counter[str] = Counter()
        self._refreshing = asyncio.Lock()
        self.refresh: Sequence[Callable[[], Awaitable[None]]] = ()

    async def start(self) -> None:
        """Bind the address.

        Raises:
            ConfigurationError: it cannot be bound.
        """
        host, port = host_and_port(self._listen)
        try:
            self._server = await asyncio.start_server(
                self._serve, host, port, limit=_MAX_HEAD_BYTES
            )
        except OSError as error:
            raise cannot_bind(VARIABLE, self._listen) from error
        _log.info("metrics", port=self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Accept no more connections."""
        if self._server is not None:
            self._server.close()

    @property
    def connections(self) -> int:
        """The number of connections that are being answered."""
        return self._connections.total()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        address = str(peer[0]) if peer else ""
        if (
            self._connections.total() >= CONNECTIONS
            or self._connections[address] >= CONNECTIONS_OF_ONE_ADDRESS
        ):
            writer.transport.abort()
            return
        self._connections[address] += 1
        try:
            async with asyncio.timeout(_LIMIT.total_seconds()):
                head = await reader.readuntil(b"\r\n\r\n")
                answer = await self._answer(head)
                if writer.is_closing():
                    return  # uvloop refuses to write for a client that has left
                writer.write(answer)
                writer.close()
                # Wait until the client has read the answer, or the limit ends.
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client left, is too slow, or does not speak HTTP
        finally:
            # After `close` alone, the connection stays open until the client has read everything.
            writer.transport.abort()
            self._connections[address] -= 1
            if not self._connections[address]:
                del self._connections[address]

    async def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"use GET\n")
        if path != b"/metrics":
            return _response("404 Not Found", b"the metrics are at /metrics\n")
        # One scrape at a time, because several would ask the stores the same questions.
        async with self._refreshing:
            await self._refresh()
            body = generate_latest(self._registry)
        answer = _response("200 OK", body, CONTENT_TYPE_LATEST)
        return answer[: -len(body)] if method == b"HEAD" else answer

    async def _refresh(self) -> None:
        if self.refresh:
            with suppress(TimeoutError):
                async with asyncio.timeout(_REFRESH_LIMIT.total_seconds()):
                    await asyncio.gather(*(each() for each in self.refresh))


def _response(status: str, body: bytes, kind: str = "text/plain; charset=utf-8") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body
