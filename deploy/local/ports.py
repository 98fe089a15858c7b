"""TCP ports on loopback."""

from __future__ import annotations

import socket

LOOPBACK = "127.0.0.1"


def free_port(preferred: int | None = None) -> int:
    """Return `preferred` if it can be bound on loopback now, else a port that can be.

    Somebody else may take it before the caller does: a server that was given a free port must be
    ready to be given another.
    """
    for port in (preferred, 0) if preferred else (0,):
        with socket.socket() as probe:
            # As servers do: a connection in TIME_WAIT is no reason to go elsewhere.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                if not port:
                    raise
                continue
            return int(probe.getsockname()[1])
    raise AssertionError
