"""Limits the connections to a server, in all and per peer, and the time of a handshake.

gRPC limits the connections of all peers and the time of a handshake itself. It accepts connections
in its own threads and cannot count them per peer. So this module looks at the process's sockets a
few times a second, and shuts down what a peer has beyond its limit, the newest first. gRPC then
sees the end of the connection, as if the peer had left.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import structlog

from outbox_server.shared.rpc.peers import peer_of

# The time between two checks, in seconds. gRPC accepts some thousand connections in this time.
_PAUSE_S: Final = 0.1
# The minimum time between two log lines, so that a flood does not fill the log.
_LOG_EVERY_S: Final = 10.0
# Open files that a server keeps for its stores, mail servers, DNS, logs and libraries.
_RESERVED_FILES: Final = 256
# More than any server needs. Some systems allow a billion.
_MOST_FILES: Final = 65_536
# The limit of the TLS handshake and the start of HTTP/2 together.
HANDSHAKE_MS: Final = 10_000
# A connection without a call for this long is ended. Clients connect again at their next call.
IDLE_MS: Final = 5 * 60_000

_FILES: Final = Path("/proc/self/fd")


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard one, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return wanted if soft == resource.RLIM_INFINITY else soft


def connection_options(wanted: int) -> tuple[tuple[str, int], ...]:
    """Return gRPC's options for at most `wanted` connections, or fewer if few files are allowed."""
    return (
        (
            "grpc.max_allowed_incoming_connections",
            max(min(wanted, raise_file_limit() - _RESERVED_FILES), 1),
        ),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", IDLE_MS),
    )


class ConnectionGuard:
    """Keeps each peer of a listening `port` at `per_peer` connections, while it runs."""

    def __init__(self, port: int, per_peer: int) -> None:
        self._port = port
        self._per_peer = per_peer
        self._task: asyncio.Task[None] | None = None
        # The remote addresses of the connections at the last check.
        self._known: frozenset[Any] = frozenset()
        self._closed = 0
        self._logged_at = self._failed_at = -_LOG_EVERY_S
        self._log = structlog.get_logger("outbox.connections")

    def start(self) -> None:
        """Check regularly until `stop`."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop checking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _run(self) -> None:
        while True:
            # If fewer files are open, no peer can have too many connections. Reading the folder
            # takes a few microseconds, and so does reading each socket.
            try:
                crowded = len(os.listdir(_FILES)) > self._per_peer  # noqa: PTH208 - names only
                if crowded:
                    await asyncio.to_thread(self._look)
            except OSError as error:
                # Too many files are open, for example.
                self._report_failure(error)
            await asyncio.sleep(_PAUSE_S)

    def _look(self) -> None:
        """Shut down the connections beyond the limits."""
        by_peer: defaultdict[str, list[tuple[Any, int]]] = defaultdict(list)
        for name in os.listdir(_FILES):  # noqa: PTH208
            other_end = _other_end(int(name), self._port)
            if other_end is not None:
                by_peer[peer_of(other_end[0])].append((other_end, int(name)))
        known, self._known = (
            self._known,
            frozenset(other_end for found in by_peer.values() for other_end, _ in found),
        )
        for peer, found in by_peer.items():
            found.sort(key=lambda each: (each[0] not in known, each[1]))
            beyond = found[self._per_peer :]
            for other_end, number in beyond:
                _shut_down(number, self._port, other_end)
            if beyond:
                self._report(peer, len(beyond))

    def _report_failure(self, error: OSError) -> None:
        now = time.monotonic()
        if now - self._failed_at >= _LOG_EVERY_S:
            self._failed_at = now
            self._log.warning("cannot check connections", error=str(error))

    def _report(self, peer: str, closed: int) -> None:
        self._closed += closed
        now = time.monotonic()
        if now - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = now
            self._log.warning(
                "closed connections beyond the limit of their peer",
                peer=peer,
                closed=self._closed,
                limit=self._per_peer,
            )
            self._closed = 0


def _other_end(number: int, port: int) -> Any | None:
    """Return the remote address if a file is a connection that was accepted at `port`."""
    try:
        looked_at = socket.socket(fileno=number)
    except OSError:
        return None  # not a socket, or closed meanwhile
    try:
        if looked_at.family not in (socket.AF_INET, socket.AF_INET6):
            return None
        own_end = looked_at.getsockname()
        return looked_at.getpeername() if own_end[1] == port else None
    except OSError:
        return None  # it listens, or has ended
    finally:
        looked_at.detach()  # the file stays open; it belongs to gRPC


def _shut_down(number: int, port: int, other_end: Any) -> None:
    """End a connection. gRPC may have closed it meanwhile, and reused its number."""
    with suppress(OSError):
        held = os.dup(number)
        try:
            # The duplicate cannot be closed or reused by gRPC.
            if _other_end(held, port) == other_end:
                ending = socket.socket(fileno=held)
                try:
                    ending.shutdown(socket.SHUT_RDWR)
                finally:
                    ending.detach()
        finally:
            os.close(held)
