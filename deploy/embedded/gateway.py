"""Envoy in front of the services of the embedded stack."""

from __future__ import annotations

import asyncio
import http.client
import secrets
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from outbox_server.deploy.child import Child
from outbox_server.deploy.embedded.local_server import LocalServer
from outbox_server.deploy.envoy.files import envoy_command, write_folder
from outbox_server.deploy.envoy.gateway import HEALTH, Gateway
from outbox_server.deploy.ports import LOOPBACK

_START_LIMIT: Final = 30.0
_CHECK_LIMIT_S: Final = 2.0


class EmbeddedGateway(LocalServer):
    """Envoy on loopback: REST, gRPC-Web and gRPC on one port, which a restart keeps."""

    NAME = "the gateway"
    STOP = ((signal.SIGTERM, 5.0),)

    def __init__(
        self, folder: Path, processes: Mapping[str, str], *, port: int | None, log: Path
    ) -> None:
        """Take the addresses of the processes, and the port; None means a free one."""
        super().__init__(folder, port, log)
        self._processes = dict(processes)
        # Tells this Envoy from another one on the same port.
        self._name = f"outbox-{secrets.token_hex(4)}"

    @property
    def url(self) -> str:
        """The URL of the API; known after the first start."""
        return f"http://{LOOPBACK}:{self.port}"

    async def start(self) -> None:
        """Start, and return when it reports that it is healthy.

        Raises:
            LocalServerError: it is not installed, or did not start.
        """
        await self._start(
            self._child_on, lambda: asyncio.to_thread(self._healthy, self.port), _START_LIMIT
        )

    def _child_on(self, port: int) -> Child:
        """Write Envoy's files, in about 0.1 s, and return the child that reads them."""
        gateway = Gateway(
            f"{LOOPBACK}:{port}",
            self.folder,
            self._processes,
            local_only=True,
            name=self._name,
        )
        argv = [*envoy_command(write_folder(gateway)), "--concurrency", "1"]
        return Child(self.NAME, argv, log=self._log, cwd=self.folder)

    def _healthy(self, port: int) -> bool:
        connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_CHECK_LIMIT_S)
        try:
            connection.request("GET", HEALTH)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return answer.status == http.HTTPStatus.OK and answer.getheader("server") == self._name
