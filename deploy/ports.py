"""TCP ports on loopback."""

from __future__ import annotations

import secrets
import socket
import sys
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Final

LOOPBACK: Final = "127.0.0.1"


def free_port(preferred: int | None = None) -> int:
    """Return `preferred` if it can be bound on loopback now, else another port that can be.

    Another process may take the port before the caller does, so the caller must be able to try
    another one. This is rare: the system gives none of these ports to sockets that ask for any.
    """
    # The system's own choice is the last one.
    for port in (*((preferred,) if preferred else ()), *islice(_ports, _MOST_TRIES), 0):
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


def skip_to_part(part: int, parts: int, seed: int) -> None:
    """Let `free_port` go on where one of several equal parts of the ports begins.

    `parts` is their number, and `part` counts from 0. Processes with the same `seed` and different
    parts find different ports, until one of them has used up its part.
    """
    if ports := _unassigned():
        first = ports[(seed + part * len(ports) // parts) % len(ports)]
        while next(_ports) != first:
            pass


def _unassigned() -> range:
    """Return the ports that the system assigns to no socket."""
    try:
        assigned_from = int(_ASSIGNED.read_text("ascii").split()[0])
    except (OSError, ValueError):
        return range(0)
    return range(_FIRST, assigned_from)


def _unassigned_ports() -> Iterator[int]:
    """Yield the ports that the system assigns to no socket, each process from another one on."""
    if ports := _unassigned():
        start = secrets.randbelow(len(ports))
        yield from cycle([*ports[start:], *ports[:start]])


# The first and the last port that Linux assigns.
_ASSIGNED: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
# Servers that are installed usually have ports below.
_FIRST: Final = 20_000
_MOST_TRIES: Final = 100
_ports: Final = _unassigned_ports()


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
