"""Debian's PgBouncer in transaction mode, in front of a PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg

from outbox_server.deploy.child import Child
from outbox_server.deploy.ports import LOOPBACK, free_port
from tests.eventually import eventually

_BINARY = "/usr/sbin/pgbouncer"


class PgBouncer:
    """A pooler with few sessions, so that each transaction of a client may get another one."""

    def __init__(self, folder: Path, server_port: int, password: str) -> None:
        assert Path(_BINARY).exists(), "apt-get install pgbouncer"
        self.port = free_port()
        self._folder = folder
        self._password = password
        self._configure(server_port)
        # It refuses to run as root.
        user = ["-u", "nobody"] if os.geteuid() == 0 else []
        self._child = Child(
            "PgBouncer", [_BINARY, *user, folder / "ini"], log=folder / "log", cwd=folder
        )

    def _configure(self, server_port: int) -> None:
        (self._folder / "ini").write_text(
            f"[databases]\n* = host={LOOPBACK} port={server_port} user=outbox"
            f" password={self._password}\n"
            f"[pgbouncer]\nlisten_addr = {LOOPBACK}\nlisten_port = {self.port}\n"
            "unix_socket_dir =\nauth_type = any\npool_mode = transaction\n"
            "default_pool_size = 5\nmax_client_conn = 200\nserver_login_retry = 1\n"
        )

    def url(self, database: str) -> str:
        return f"postgresql://outbox@{LOOPBACK}:{self.port}/{database}"

    async def start(self, database: str) -> None:
        self._child.start()

        def answers() -> bool:
            assert self._child.running, (self._folder / "log").read_text()
            try:
                psycopg.connect(self.url(database), connect_timeout=5).close()
            except psycopg.OperationalError:
                return False
            return True

        await eventually(lambda: asyncio.to_thread(answers))

    async def kill(self) -> None:
        """End it with kill -9."""
        await self._child.stop()

    def lead_to(self, server_port: int) -> None:
        """Lead to another server from the next transaction on."""
        self._configure(server_port)
        os.kill(self._child.pid, signal.SIGHUP)


@asynccontextmanager
async def pooler(server_port: int, database: str, password: str) -> AsyncIterator[PgBouncer]:
    """Run a PgBouncer in front of a server; it alone has the password of the role `outbox`."""
    # Not pytest's folder: only its owner may enter it, and PgBouncer does not run as root.
    folder = Path(tempfile.mkdtemp(prefix="outbox-pgbouncer-"))
    folder.chmod(0o755)  # noqa: ASYNC240
    bouncer = PgBouncer(folder, server_port, password)
    try:
        await bouncer.start(database)
        yield bouncer
    finally:
        await bouncer.kill()
        shutil.rmtree(folder)
