"""Debian's PgBouncer in transaction mode, in front of a PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from outbox_server.deploy.child import Child, LocalServerError
from outbox_server.deploy.ports import LOOPBACK, free_port
from outbox_server.deploy.private_files import write_private

BINARY: Final = Path("/usr/sbin/pgbouncer")
HOW_TO_GET: Final = "PgBouncer is missing: apt-get install pgbouncer"
_START_LIMIT_S: Final = 30.0
# It refuses to run as root.
_USER: Final = "nobody"


class PgBouncer:
    """A pooler with fewer sessions than clients: each transaction may get another one.

    It alone has the password of the role `outbox`; its clients on loopback need none.
    """

    def __init__(
        self,
        folder: Path,
        server_port: int,
        password: str,
        *,
        sessions: int = 20,
        log: Path | None = None,
    ) -> None:
        """Create a pooler in an empty folder, with at most `sessions` connections to the server.

        `log` None means a file in the folder.

        Raises:
            LocalServerError: PgBouncer is not installed.
        """
        if not BINARY.exists():
            raise LocalServerError(HOW_TO_GET)
        self.port = free_port()
        self._folder = folder
        self._password = password
        self._sessions = sessions
        self._as_root = os.geteuid() == 0
        if self._as_root:
            shutil.chown(folder, _USER)
        self._configure(server_port)
        user = ["-u", _USER] if self._as_root else []
        self.log = log or folder / "log"
        self.child = Child("PgBouncer", [BINARY, *user, folder / "ini"], log=self.log, cwd=folder)

    def _configure(self, server_port: int) -> None:
        file = self._folder / "ini"
        write_private(
            file,
            f"[databases]\n* = host={LOOPBACK} port={server_port} user=outbox"
            f" password={self._password}\n"
            f"[pgbouncer]\nlisten_addr = {LOOPBACK}\nlisten_port = {self.port}\n"
            "unix_socket_dir =\nauth_type = any\npool_mode = transaction\n"
            f"default_pool_size = {self._sessions}\nmax_client_conn = 200\n"
            "server_login_retry = 1\n",
        )
        if self._as_root:
            shutil.chown(file, _USER)

    def url(self, database: str) -> str:
        """Return the URL of a database by way of the pooler."""
        return f"postgresql://outbox@{LOOPBACK}:{self.port}/{database}"

    async def start(self) -> None:
        """Start it, and return when it accepts connections.

        Raises:
            LocalServerError: it does not start; the text quotes its log.
        """
        self.child.start()

        async def accepts() -> bool:
            try:
                _, writer = await asyncio.open_connection(LOOPBACK, self.port)
            except OSError:
                return False
            writer.close()
            await writer.wait_closed()
            return True

        await self.child.until_ready(accepts, _START_LIMIT_S)

    async def kill(self) -> None:
        """End it with kill -9."""
        await self.child.stop()

    def lead_to(self, server_port: int) -> None:
        """Lead to another server from the next transaction on."""
        self._configure(server_port)
        os.kill(self.child.pid, signal.SIGHUP)


@contextmanager
def pooler_folder() -> Iterator[Path]:
    """Make a folder for a pooler, which a process of another user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="outbox-pgbouncer-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
