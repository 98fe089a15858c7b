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

from outbox_server.deploy.child import (
    CHILD_ENVIRONMENT,
    Child,
    LocalServerError,
    run_to_end,
    stop_orphans,
)
from outbox_server.deploy.embedded.local_server import LocalServer
from outbox_server.deploy.embedded.passwords import OWNER, SUPERUSER, PasswordFile
from outbox_server.deploy.embedded.system_user import (
    DEFAULT_USER,
    all_may_enter,
    runnable_by_all,
    user_for_postgres,
)
from outbox_server.deploy.ports import LOOPBACK
from outbox_server.deploy.wheels import postgres_binaries

_INITDB_LIMIT: Final = 120.0
# It recovers the cluster first, like a start.
_PASSWORDS_LIMIT: Final = 120.0
# The recovery after a crash may replay max_wal_size of WAL.
_START_LIMIT: Final = 120.0
# SIGINT is PostgreSQL's fast shutdown: it ends sessions and writes a checkpoint. SIGQUIT is the
# immediate shutdown: nothing is lost, because the next start recovers.
_STOP: Final = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 5.0))
_SETTINGS: Final = {
    "listen_addresses": LOOPBACK,
    # The kernel limits the path of a socket to 107 bytes. A data folder's path may be longer.
    "unix_socket_directories": "",
    # Three services with a pool each, several dispatchers, and the command line.
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
# Commits stay synchronous. Without fsync that only costs a write to the page cache; with
# asynchronous commits, a kill -9 of PostgreSQL would lose the commits of the last 0.6 s.
_NOT_DURABLE: Final = {"fsync": "off", "full_page_writes": "off"}
# SCRAM, so that a program which takes the port while the server is down does not learn a password.
_ACCESS: Final = f"host all all {LOOPBACK}/32 scram-sha-256\n"
_REPLICA_ACCESS: Final = f"host replication all {LOOPBACK}/32 scram-sha-256\n"
# A copy is small, but the machine may be busy.
_COPY_LIMIT: Final = 120.0
_REPLICATED: Final = {
    # A replica that was away for a moment continues where it was.
    "wal_keep_size": "64MB",
    # The pause before a replica connects again, while synchronous commits wait for it.
    "wal_retrieve_retry_interval": "200ms",
}
# The first release whose setting decides about the iterations of SCRAM.
_SCRAM_ITERATIONS_SINCE: Final = 160_000


# What `PostgresServer.ask` raises.
QUERY_ERRORS: Final = (psycopg.Error,)


class PostgresServer(LocalServer):
    """PostgreSQL on loopback with its data in `folder`. Every login needs a password.

    Other users of this machine can reach the port, and a superuser of PostgreSQL can run programs.
    The passwords are in a file beside `folder`, which only its owner may read.

    The caller makes sure that only one process uses the folder at a time (`Servers` does, by a
    lock).
    """

    NAME = "PostgreSQL"
    STOP = _STOP

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = None,
        durable: bool = True,
        log: Path | None = None,
        binaries: Path | None = None,
        system_user: str = DEFAULT_USER,
        passwords: PasswordFile | None = None,
    ) -> None:
        """Create a server. `port` None means a free port, `binaries` None the wheel's binaries.

        If not `durable`, commits survive the death of processes, but not a crash of the machine.
        `system_user` is the user that PostgreSQL runs as if this process is root. A replica takes
        the `passwords` of its primary.
        """
        super().__init__(folder, port, log)
        self._durable = durable
        self._binaries = binaries
        self._system_user = system_user
        self.passwords: Final = passwords or PasswordFile(self.folder)
        # Whether replicas may connect, from the next start on.
        self.replicated = False

    def url(self, database: str = "outbox", role: str = OWNER) -> str:
        """Return the URL of a database, as OUTBOX_DATABASE_URL takes it."""
        return self.passwords.url(self.port, database, role)

    async def start(self) -> None:
        """Start on the data folder, created if missing, and return when a connection works.

        Orphans on the same folder are ended first.

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
        # No server runs here. The pid in the file may belong to another process by now, which
        # PostgreSQL would take for a running server.
        (self.folder / "postmaster.pid").unlink(missing_ok=True)
        await self._require_passwords(binaries, user)
        await self._start(
            lambda port: self._child_on(port, binaries, user),
            self._answers,
            _START_LIMIT,
            _STOP[1:],
        )

    def another(self, folder: Path) -> PostgresServer:
        """Return a server like this one, with the same passwords, for `start_as_replica`."""
        other = PostgresServer(
            folder,
            durable=self._durable,
            log=self._log,
            binaries=self._binaries,
            system_user=self._system_user,
            passwords=self.passwords,
        )
        other.replicated = self.replicated
        return other

    async def start_as_replica(self, primary: PostgresServer) -> None:
        """Copy a running primary that is `replicated`, and start as its streaming replica.

        Data of an earlier attempt in the folder are removed.

        Raises:
            LocalServerError: the copy failed, or the server did not start.
        """
        user = user_for_postgres(self._system_user)
        binaries = self._binaries or postgres_binaries()
        if user is not None and self._binaries is None:
            binaries = runnable_by_all(binaries)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._make_folder(self.folder, user)
        argv: list[str | Path] = [binaries / "pg_basebackup", "--checkpoint=fast", "--no-sync"]
        argv += ["--write-recovery-conf", "--pgdata", _path_for(user, self.folder)]
        argv += ["--host", LOOPBACK, "--port", str(primary.port), "--username", SUPERUSER]
        password = {"PGPASSWORD": self.passwords.password_of(SUPERUSER)}
        await run_to_end(
            Child(
                "pg_basebackup",
                argv,
                log=self._log,
                cwd=self.folder,
                user=user,
                environment=CHILD_ENVIRONMENT | password,
            ),
            _COPY_LIMIT,
        )
        await self.start()

    async def ask(self, query: str) -> Any:
        """Return the value that a query or a command returns to the superuser.

        Raises:
            psycopg.Error: the server cannot be reached, or refuses it.
        """
        connection = await psycopg.AsyncConnection.connect(
            self.url("postgres", SUPERUSER), connect_timeout=5, autocommit=True
        )
        async with connection:
            cursor = await connection.execute(query.encode())
            row = None if cursor.description is None else await cursor.fetchone()
        return None if row is None else row[0]

    async def kill(self) -> None:
        """End it with kill -9, as a fault would; returns when all its processes are gone."""
        await self.child.stop()
        await stop_orphans(self.folder, "postgres", ())

    async def ensure_database(self, database: str = "outbox") -> None:
        """Create the owner (not a superuser; may create databases) and its database, if missing."""
        name, owner = sql.Identifier(database), sql.Identifier(OWNER)
        connection = await psycopg.AsyncConnection.connect(
            self.url("postgres", SUPERUSER), autocommit=True
        )
        async with connection:
            if not await _has(connection, "pg_roles", "rolname", OWNER):
                await connection.execute(sql.SQL("CREATE ROLE {} LOGIN CREATEDB").format(owner))
            await self._set_password_of_owner(connection)
            if not await _has(connection, "pg_database", "datname", database):
                await connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(name, owner))

    async def _set_password_of_owner(self, connection: psycopg.AsyncConnection[Any]) -> None:
        if connection.info.server_version >= _SCRAM_ITERATIONS_SINCE:
            # More would slow down each login, and protect only passwords that can be guessed.
            await connection.execute("SET scram_iterations = 1")
        # The verifier instead of the password, which the log could quote.
        password = self.passwords.password_of(OWNER).encode()
        verifier = connection.pgconn.encrypt_password(password, OWNER.encode(), b"scram-sha-256")
        statement = sql.SQL("ALTER ROLE {} PASSWORD {}")
        await connection.execute(
            statement.format(sql.Identifier(OWNER), sql.Literal(verifier.decode()))
        )

    async def _require_passwords(self, binaries: Path, user: pwd.struct_passwd | None) -> None:
        """Make every login need a password, even in the data folder of an earlier release.

        The superuser's is set while no server runs, so there is no moment without a password.
        """
        access = self.folder / "pg_hba.conf"
        # Tells whether the superuser has the password of the present file.
        replicas = _REPLICA_ACCESS if self.replicated else ""
        wanted = f"# with the passwords of {self.passwords.digest}\n{_ACCESS}{replicas}"
        if access.read_text() == wanted:
            return
        argv: list[str | Path] = [binaries / "postgres", "--single"]
        argv += ["-D", _path_for(user, self.folder)]
        # An error would be logged without the statement, which has the password.
        settings = {"log_min_error_statement": "panic"}
        argv += _options(settings | ({} if self._durable else _NOT_DURABLE))
        password = self.passwords.password_of(SUPERUSER)
        single = Child(
            "PostgreSQL in single-user mode",
            [*argv, "postgres"],
            log=self._log,
            cwd=self.folder,
            user=user,
            stdin=f"ALTER ROLE {SUPERUSER} PASSWORD '{password}'\n",
        )
        await run_to_end(single, _PASSWORDS_LIMIT)
        # Written over the existing file, which belongs to the user of the server. An incomplete one
        # lets nobody in, and the next start repeats this.
        access.write_text(wanted)

    async def _initialise(self, binaries: Path, user: pwd.struct_passwd | None) -> None:
        # Create it under another name and rename it, so that a kill leaves no incomplete folder.
        fresh = self.folder.with_name(f"{self.folder.name}.new")
        await stop_orphans(fresh, "postgres", ())
        shutil.rmtree(fresh, ignore_errors=True)
        self._make_folder(fresh, user)
        argv: list[str | Path] = [binaries / "initdb", "--pgdata", _path_for(user, fresh)]
        # Nobody may log in until there are passwords.
        argv += ["--auth=reject"]
        argv += [f"--username={SUPERUSER}", "--encoding=UTF8", "--locale=C", "--no-sync"]
        initdb = Child("initdb", argv, log=self._log, cwd=fresh, user=user)
        await run_to_end(initdb, _INITDB_LIMIT)
        if self._durable:
            # initdb itself would sync the files one by one; one sync of all is as good.
            os.sync()
        try:
            fresh.rename(self.folder)
        except OSError as error:
            raise LocalServerError(
                f"{self.folder} is not a data folder of PostgreSQL: {error}"
            ) from None

    def _make_folder(self, folder: Path, user: pwd.struct_passwd | None) -> None:
        folder.mkdir(mode=0o700)
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)

    def _child_on(self, port: int, binaries: Path, user: pwd.struct_passwd | None) -> Child:
        settings = _SETTINGS | {"port": str(port)} | ({} if self._durable else _NOT_DURABLE)
        settings |= _REPLICATED if self.replicated else {}
        argv: list[str | Path] = [binaries / "postgres", "-D", _path_for(user, self.folder)]
        return Child(
            self.NAME,
            [*argv, *_options(settings)],
            log=self._log,
            cwd=self.folder,
            user=user,
            # The postmaster ends its own children.
            death_signal=signal.SIGINT,
        )

    async def _answers(self) -> bool:
        try:
            # Without a transaction, because a cancellation during its commit at the end of the
            # block would leave the connection open.
            connection = await psycopg.AsyncConnection.connect(
                self.url("postgres", SUPERUSER), connect_timeout=5, autocommit=True
            )
            async with connection:
                pid_file = "SELECT split_part(pg_read_file('postmaster.pid'), chr(10), 1)::int"
                found = await (await connection.execute(pid_file)).fetchone()
        except psycopg.Error:
            return False
        # Another server may have the port; ours then ends with an error in its log.
        return found == (self.child.pid,)


def _path_for(user: pwd.struct_passwd | None, folder: Path) -> Path:
    """Return a path of the working directory `folder` that `user` can use.

    If other users may not enter the folders above it, and we must not change their permissions,
    this is the kernel's link to the working directory. It is not used otherwise, because the
    initdb of PostgreSQL 15 and earlier changes its working directory.
    """
    if user is None or all_may_enter(folder.parent):
        return folder
    return Path("/proc/self/cwd")


def _options(settings: dict[str, str]) -> list[str]:
    return [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]


async def _has(
    connection: psycopg.AsyncConnection[Any], table: str, column: str, value: str
) -> bool:
    query = sql.SQL("SELECT 1 FROM {} WHERE {} = %s").format(
        sql.Identifier(table), sql.Identifier(column)
    )
    return await (await connection.execute(query, [value])).fetchone() is not None
