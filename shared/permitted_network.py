"""Connections of HTTP clients to hosts that users chose, if `Egress` permits their addresses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import httpcore

from outbox_server.shared.egress import Egress


class PermittedNetwork(httpcore.AsyncNetworkBackend):
    """Connects only to permitted addresses. The name is looked up once, before the check."""

    def __init__(self, egress: Egress, user: str) -> None:
        self._egress = egress
        self._user = user
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
            OSError: there is no such host, or no address answers.
        """
        failure: Exception | None = None
        for address in await self._egress.permitted_addresses(host, user=self._user):
            try:
                # TLS checks the certificate against the host name in the URL, not the address.
                return await self._network.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise OSError(f"no connection to {host}, port {port}: {failure}")

    async def sleep(self, seconds: float) -> None:
        """Wait. httpcore calls this between retries, which are switched off."""
        await asyncio.sleep(seconds)
