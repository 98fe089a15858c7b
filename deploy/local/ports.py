"""TCP ports on loopback."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path
from typing import IO

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


def claim_port(port: int) -> IO[bytes] | None:
    """Return what keeps other stacks of this user off a port until it is closed; None: one has it.

    Between the look at a port and a server on it seconds go by. Two stacks that were started
    together both found the usual ports free, and the one that lost took the other's answers to its
    health checks for those of its own service.
    """
    path = Path(tempfile.gettempdir(), f"outbox-{os.getuid()}-port-{port}.lock")
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
