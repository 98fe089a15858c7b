"""Connections of HTTP clients to hosts that users chose, if `Egress` permits their addresses.

What such a host sends is bounded, too: a server may answer with any number of informational
responses, and httpcore reads all that have arrived without a pause of the event loop.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from typing import Any, Final

import httpcore

from outbox_server.shared.egress import Egress, reason_of


class NoConnection(OSError):
    """No address of a host answers. The text names the host, the port and the cause."""


# How much is read at a time. The informational responses in it take httpcore about 5 ms.
_AT_ONCE: Final = 4 * 1024


class _BoundedStream(httpcore.AsyncNetworkStream):
    """A connection from which at most `most` bytes are read."""

    def __init__(self, stream: httpcore.AsyncNetworkStream, most: int) -> None:
        self._stream = stream
        self._left = most

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        """Return the next bytes.

        Raises:
            httpcore.RemoteProtocolError: the server has sent too many.
        """
        if not self._left:
            raise httpcore.RemoteProtocolError("the answer is too long")
        found = await self._stream.read(min(max_bytes, _AT_ONCE, self._left), timeout)
        self._left -= len(found)
        return found

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Write all bytes."""
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        """Return the connection with TLS, with the same bound."""
        stream = await self._stream.start_tls(ssl_context, server_hostname, timeout)
        return _BoundedStream(stream, self._left)

    def get_extra_info(self, info: str) -> Any:
        """Return what httpcore asks about the connection."""
        return self._stream.get_extra_info(info)


class PermittedNetwork(httpcore.AsyncNetworkBackend):
    """Connects only to permitted addresses. The name is looked up once, before the check."""

    def __init__(self, egress: Egress, user: str, most: int) -> None:
        """Read at most `most` bytes from each connection."""
        self._egress = egress
        self._user = user
        self._most = most
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Return a connection to the first permitted address that answers.

        Raises:
            EgressRefused: none of the host's addresses is permitted.
            NoConnection: no address answers.
            OSError: there is no such host.
        """
        failure: Exception | None = None
        for address in await self._egress.permitted_addresses(host, user=self._user):
            try:
                # TLS checks the certificate against the host name in the URL, not the address.
                stream = await self._network.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
                return _BoundedStream(stream, self._most)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise NoConnection(f"no connection to {host}, port {port}: {reason_of(_cause(failure))}")

    async def sleep(self, seconds: float) -> None:
        """Wait. httpcore calls this between retries, which are switched off."""
        await asyncio.sleep(seconds)


def _cause(error: BaseException | None) -> BaseException | None:
    """Return the error of the operating system that libraries wrapped, or the innermost error."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return error
