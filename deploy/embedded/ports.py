"""TCP ports on loopback."""

from __future__ import annotations

import socket
import sys

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


def claim_port(port: int) -> socket.socket | None:
    """Return what keeps other stacks off a port until it is closed; None: one has it.

    Seconds pass between the check of a port and the start of a server on it. Two stacks that were
    started together both found the usual ports free, and the one that lost took the other's
    answers to its health checks for those of its own service. A name in Linux's abstract namespace
    is known to all users and folders of a network namespace, as a port is, and ends with its
    process.
    """
    claim = socket.socket(socket.AF_UNIX)
    if sys.platform == "linux":
        try:
            claim.bind(f"\0outbox-port-{port}")
        except OSError:
            claim.close()
            return None
    return claim
