"""Envoy in front of the services of the embedded stack."""

from __future__ import annotations

import asyncio
import http.client
import secrets
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from outbox_server.deploy.child import Child, LocalServerError
from outbox_server.deploy.envoy.files import envoy_command, write_folder
from outbox_server.deploy.envoy.gateway import HEALTH, Gateway
from outbox_server.deploy.ports import LOOPBACK, free_port

_START_LIMIT: Final = 30.0
_STOP: Final = ((signal.SIGTERM, 5.0),)
_CHECK_LIMIT_S: Final = 2.0
_PORT_TRIES: Final = 5


class EmbeddedGateway:
    """Envoy on loopback: REST, gRPC-Web and gRPC on one port, which a restart keeps."""

    def __init__(
        self, folder: Path, processes: Mapping[str, str], *, port: int | None, log: Path
    ) -> None:
        """Take the addresses of the processes, and the port; None means a free one."""
        self.folder = folder.resolve()
        self._processes = dict(processes)
        self._wanted_port = port
        self._port: int | None = port
        self._log = log
        self._child: Child | None = None
        # Tells this Envoy from another one on the same port.
        self._name = f"outbox-{secrets.token_hex(4)}"

    @property
    def url(self) -> str:
        """The URL of the API; known after the first start."""
        if self._port is None:
            raise RuntimeError("the gateway was not started")
        return f"http://{LOOPBACK}:{self._port}"

    @property
    def child(self) -> Child:
        """Its process."""
        if self._child is None:
            raise RuntimeError("the gateway was not started")
        return self._child

    async def start(self) -> None:
        """Start, and return when it reports that it is healthy.

        Raises:
            LocalServerError: it is not installed, or did not start.
        """
        for tries_left in reversed(range(_PORT_TRIES)):
            self._port = self._port or free_port()
            try:
                await self._run(self._port)
            except LocalServerError as error:
                if (
                    self._wanted_port
                    or not tries_left
                    or "Address already in use" not in str(error)
                ):
                    raise
                self._port = None  # another process took the port; take another one
            else:
                self._wanted_port = self._port  # clients use this port from now on
                return

    async def stop(self) -> None:
        """Stop, in at most about 5 s; do nothing if it does not run."""
        if self._child is not None:
            await self._child.stop(*_STOP)

    async def _run(self, port: int) -> None:
        gateway = Gateway(
            f"{LOOPBACK}:{port}",
            self.folder,
            self._processes,
            local_only=True,
            name=self._name,
        )
        config = await asyncio.to_thread(write_folder, gateway)
        argv = [*envoy_command(config), "--concurrency", "1"]
        child = Child("the gateway", argv, log=self._log, cwd=self.folder)
        self._child = child
        child.start()
        try:
            await child.until_ready(lambda: asyncio.to_thread(self._healthy, port), _START_LIMIT)
        except BaseException:
            await child.stop()
            raise

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
