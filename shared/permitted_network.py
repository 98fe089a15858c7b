"""Connections of HTTP clients to hosts that users chose, if `Egress` permits their addresses.

What such a host sends is bounded, too: a server may answer with any number of informational
responses, and httpcore reads all that have arrived without a pause of the event loop.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import httpcore

from outbox_server.shared.egress import Egress, reason_of


class NoConnection(OSError):
    """No address of a host answers. The text names the host, the port and the cause."""


# How much is read at a time. The informational responses in it take httpcore about 5 ms.
_AT_ONCE: Final = 4 * 1024


@dataclass(slots=True)
class _Budget:
    """How many bytes may still be read."""

    left: int


class _BoundedStream(httpcore.AsyncNetworkStream):
    """A connection from which no more bytes are read than the budget has."""

    def __init__(self, stream: httpcore.AsyncNetworkStream, budget: _Budget) -> None:
        self._stream = stream
        self._budget = budget

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        """Return the next bytes.

        Raises:
            httpcore.RemoteProtocolError: the server has sent too many.
        """
        if not self._budget.left:
            raise httpcore.RemoteProtocolError("the answer is too long")
        most = min(max_bytes, _AT_ONCE, self._budget.left)
        found = await self._stream.read(most, timeout)
        self._budget.left -= len(found)
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
        return _BoundedStream(stream, self._budget)

    def get_extra_info(self, info: str) -> Any:
        """Return what httpcore asks about the connection."""
        return self._stream.get_extra_info(info)


class PermittedNetwork(httpcore.AsyncNetworkBackend):
    """Connects only to permitted addresses. The name is looked up once, before the check."""

    def __init__(self, egress: Egress, user: str, most: int) -> None:
        """Read at most `most` bytes, until `renew` is called."""
        self._egress = egress
        self._user = user
        self._most = most
        self._budget = _Budget(most)
        self._network = httpcore.AnyIOBackend()

    def renew(self) -> None:
        """Allow as many bytes again, for the answer to the next request."""
        self._budget.left = self._most

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
                return _BoundedStream(stream, self._budget)
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
