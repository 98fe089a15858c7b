"""TCP ports on loopback."""

from __future__ import annotations

import socket
import sys

LOOPBACK = "127.0.0.1"


def free_port(preferred: int | None = None) -> int:
    """Return `preferred` if it can be bound on loopback now, else another port that can be.

    Another process may take the port before the caller does, so the caller must be able to try
    another one.
    """
    for port in (preferred, 0) if preferred else (0,):
        with socket.socket() as probe:
            # Servers set it too: a connection in TIME_WAIT does not block the port.
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
    """Return a socket that reserves a port among stacks until it is closed; None if it is taken.

    Seconds pass between the check of a port and the start of a server on it. Without a claim, two
    stacks that start together both find the usual ports free. The slower one would then mistake the
    other stack's service for its own. Like a port, a name in Linux's abstract namespace is visible
    to all users of a network namespace, and it disappears with its process.
    """
    claim = socket.socket(socket.AF_UNIX)
    if sys.platform == "linux":
        try:
            claim.bind(f"\0outbox-port-{port}")
        except OSError:
            claim.close()
            return None
    return claim
