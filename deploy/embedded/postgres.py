"""A real PostgreSQL in a data folder, for `outbox up`, `outbox demo` and the tests."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import sql

from outbox_server.deploy.embedded.child import Child, LocalServerError, run_to_end, stop_orphans
from outbox_server.deploy.embedded.ports import LOOPBACK, free_port
from outbox_server.deploy.embedded.system_user import (
    DEFAULT_USER,
    all_may_enter,
    runnable_by_all,
    user_for_postgres,
)
from outbox_server.deploy.embedded.wheels import postgres_binaries

SUPERUSER: Final = "postgres"
_INITDB_LIMIT: Final = 120.0
# Recovery after a crash may replay a whole max_wal_size.
_START_LIMIT: Final = 120.0
# SIGINT is PostgreSQL's fast shutdown: sessions are ended, a checkpoint is written. SIGQUIT is the
# immediate one: nothing is lost by it, the next start recovers.
_STOP: Final = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 5.0))
_PORT_TRIES: Final = 5
_SETTINGS: Final = {
    "listen_addresses": LOOPBACK,
    # The path of a socket may have 107 bytes, a data folder's may be longer.
    "unix_socket_directories": "",
    # Three services with a pool each, several dispatchers, and the command line.
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
# Commits stay synchronous: without fsync that costs a write to the page cache, and without it a
# kill -9 of PostgreSQL would lose what was committed in the last 0.6 s.
_NOT_DURABLE: Final = {"fsync": "off", "full_page_writes": "off"}


class PostgresServer:
    """PostgreSQL on loopback, every local user trusted, with its data in `folder`.

    It may be started again after `stop` or `kill`, on the same port. One holder a folder at a
    time: whoever constructs it makes sure of that (`Servers` does, by a lock).
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = None,
        durable: bool = True,
        log: Path | None = None,
        binaries: Path | None = None,
        system_user: str = DEFAULT_USER,
    ) -> None:
        """Take a `port`, None for a free one, and a folder of `binaries`, None for the wheel's.

        Not `durable`: what was committed survives the death of every process, but not of the
        machine. `system_user` is who PostgreSQL runs as if this process is root.
        """
        self.folder = folder.resolve()
        self._wanted_port = port
        self._port: int | None = port
        self._durable = durable
        self._log = log or self.folder.with_name(f"{folder.name}.log")
        self._binaries = binaries
        self._system_user = system_user
        self._child: Child | None = None

    @property
    def port(self) -> int:
        """The TCP port; known after the first start."""
        if self._port is None:
            raise RuntimeError("PostgreSQL was not started")
        return self._port

    @property
    def child(self) -> Child:
        """The postmaster's process."""
        if self._child is None:
            raise RuntimeError("PostgreSQL was not started")
        return self._child

    def url(self, database: str = "outbox", role: str = "outbox") -> str:
        """Return the URL of a database, as OUTBOX_DATABASE_URL takes it."""
        return f"postgresql://{role}@{LOOPBACK}:{self.port}/{database}"

    async def start(self) -> None:
        """Start on the data folder, made if there is none; returns when a connection works.

        Ends an orphan on the same folder first.

        Raises:
            LocalServerError: it did not start; the text quotes its log.
        """
        await stop_orphans(self.folder, "postgres", _STOP)
        user = user_for_postgres(self._system_user)
        binaries = self._binaries or postgres_binaries()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if user is not None and self._binaries is None:
            binaries = runnable_by_all(binaries)
        if not (self.folder / "PG_VERSION").exists():
            await self._initialise(binaries, user)
        # Nobody runs here, as we saw; its pid may by now be another process, which PostgreSQL
        # would take for a running server.
        (self.folder / "postmaster.pid").unlink(missing_ok=True)
        for tries_left in reversed(range(_PORT_TRIES)):
            self._port = self._port or free_port()
            try:
                await self._run(binaries, user, self._port)
            except LocalServerError as error:
                if (
                    self._wanted_port
                    or not tries_left
                    or "Address already in use" not in str(error)
                ):
                    raise
                self._port = None  # somebody was faster; take another
            else:
                self._wanted_port = self._port  # whoever uses it counts on it from now on
                return

    async def stop(self) -> None:
        """Stop in an orderly way, in at most some 15 s; does nothing if it does not run."""
        if self._child is not None:
            await self._child.stop(*_STOP)

    async def kill(self) -> None:
        """End it with kill -9, as a fault would; returns when all its processes are gone."""
        await self.child.stop()
        await stop_orphans(self.folder, "postgres", ())

    async def ensure_database(self, database: str = "outbox", role: str = "outbox") -> None:
        """Make the role (no superuser; may create databases) and its database, if missing."""
        name, owner = sql.Identifier(database), sql.Identifier(role)
        connection = await psycopg.AsyncConnection.connect(
            self.url("postgres", SUPERUSER), autocommit=True
        )
        async with connection:
            if not await _has(connection, "pg_roles", "rolname", role):
                await connection.execute(sql.SQL("CREATE ROLE {} LOGIN CREATEDB").format(owner))
            if not await _has(connection, "pg_database", "datname", database):
                await connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(name, owner))

    async def _initialise(self, binaries: Path, user: pwd.struct_passwd | None) -> None:
        # Made beside and renamed, so that a kill in the middle leaves no half folder behind.
        fresh = self.folder.with_name(f"{self.folder.name}.new")
        await stop_orphans(fresh, "postgres", ())
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        if user is not None:
            os.chown(fresh, user.pw_uid, user.pw_gid)
        argv: list[str | Path] = [binaries / "initdb", "--pgdata", _path_for(user, fresh)]
        argv += ["--auth=trust"]
        argv += [f"--username={SUPERUSER}", "--encoding=UTF8", "--locale=C", "--no-sync"]
        initdb = Child("initdb", argv, log=self._log, cwd=fresh, user=user)
        await run_to_end(initdb, _INITDB_LIMIT)
        if self._durable:
            # initdb's own sync asks for every file, one by one; one sync of all is as good.
            os.sync()
        try:
            fresh.rename(self.folder)
        except OSError as error:
            raise LocalServerError(
                f"{self.folder} is no data folder of PostgreSQL: {error}"
            ) from None

    async def _run(self, binaries: Path, user: pwd.struct_passwd | None, port: int) -> None:
        settings = _SETTINGS | {"port": str(port)} | ({} if self._durable else _NOT_DURABLE)
        argv: list[str | Path] = [binaries / "postgres", "-D", _path_for(user, self.folder)]
        for name, value in settings.items():
            argv += ["-c", f"{name}={value}"]
        child = Child(
            "PostgreSQL",
            argv,
            log=self._log,
            cwd=self.folder,
            user=user,
            # Its own children end when it does.
            death_signal=signal.SIGINT,
        )
        self._child = child
        child.start()
        try:
            await child.until_ready(self._answers, _START_LIMIT)
        except BaseException:
            await child.stop(*_STOP[1:])
            raise

    async def _answers(self) -> bool:
        try:
            connection = await psycopg.AsyncConnection.connect(
                self.url("postgres", SUPERUSER), connect_timeout=5
            )
            async with connection:
                pid_file = "SELECT split_part(pg_read_file('postmaster.pid'), chr(10), 1)::int"
                found = await (await connection.execute(pid_file)).fetchone()
        except psycopg.Error:
            return False
        # Another server may have the port; ours will then end with its own words.
        return found == (self.child.pid,)


def _path_for(user: pwd.struct_passwd | None, folder: Path) -> Path:
    """Return a path of the working directory `folder` that `user` can use.

    If other users may not enter the folders above it, this is the kernel's link to the working
    directory, which leads past them. It is not used otherwise, because the initdb of PostgreSQL 15
    and earlier changes its working directory.
    """
    if user is None or all_may_enter(folder.parent):
        return folder
    return Path("/proc/self/cwd")


async def _has(
    connection: psycopg.AsyncConnection[Any], table: str, column: str, value: str
) -> bool:
    query = sql.SQL("SELECT 1 FROM {} WHERE {} = %s").format(
        sql.Identifier(table), sql.Identifier(column)
    )
    return await (await connection.execute(query, [value])).fetchone() is not None
