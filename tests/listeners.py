"""Lists TCP sockets of processes, from /proc."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

# The numbers of states in /proc/net/tcp.
_ESTABLISHED = "01"
_LISTENING = "0A"


def listeners(pids: Iterable[int] | None = None) -> set[str]:
    """Return the addresses of listening TCP sockets, `0100007F:0019` for 127.0.0.1:25.

    Args:
        pids: Processes whose sockets count; None counts the sockets of all processes.
    """
    inodes = None if pids is None else {inode for pid in pids for inode in _sockets(pid)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == _LISTENING and (inodes is None or inode in inodes):
                found.add(local)
    return found


def listening_ports(pids: Iterable[int]) -> set[int]:
    """Return the ports that processes listen on."""
    return {int(local.rpartition(":")[2], 16) for local in listeners(pids)}


def connections_at(port: int) -> int:
    """Return how many connections the server that listens on a port has."""
    return sum(
        state == _ESTABLISHED and int(local.rpartition(":")[2], 16) == port
        for table in ("tcp", "tcp6")
        for _, local, _, state, *_ in map(
            str.split, Path("/proc/net", table).read_text().splitlines()[1:]
        )
    )


def _sockets(pid: int) -> set[str]:
    """Return the inodes of the sockets that a process holds; none once it has ended."""
    inodes = set()
    # A process may end, or close a file, while its files are listed.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if found := re.fullmatch(r"socket:\[(\d+)\]", str(file.readlink())):
                    inodes.add(found[1])
    return inodes
