"""Limits the calls that one peer may make without an API key.

A peer is the remote end of connections: an IPv4 address, or an IPv6 network.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final
from urllib.parse import unquote

from outbox_server.shared.errors import ResourceExhausted

_RETRY_AFTER: Final = timedelta(seconds=5)
# One host usually has a whole network of IPv6 addresses.
_IPV6_PREFIX: Final = 64


def peer_of(address: str) -> str:
    """Return the peer that has an IP address: the address itself, or its IPv6 network (/64)."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, _IPV6_PREFIX), strict=False))


def peer_of_call(peer: str) -> str:
    """Return the peer of a call, which gRPC describes as `ipv4:127.0.0.1:5000` or the like."""
    family, _, rest = unquote(peer).partition(":")
    if family not in ("ipv4", "ipv6"):
        return family  # a Unix socket: everybody who may open it
    return peer_of(rest.rpartition(":")[0].strip("[]"))


class PeerPlaces:
    """A bound on calls in progress, per peer and in all. `what` names the calls."""

    def __init__(self, what: str, *, per_peer: int, total: int) -> None:
        self._what = what
        self._per_peer = per_peer
        self._total = total
        self._taken: Counter[str] = Counter()

    @contextmanager
    def place_of(self, peer: str) -> Iterator[None]:
        """Hold a place of a peer until the end of the block.

        Raises:
            ResourceExhausted: TOO_MANY_CALLS: this peer, or all together, have all their places.
        """
        if self._taken[peer] >= self._per_peer:
            raise self._refusal(f"peer {peer}", self._per_peer)
        if self._taken.total() >= self._total:
            raise self._refusal("server", self._total)
        self._taken[peer] += 1
        try:
            yield
        finally:
            self._taken[peer] -= 1
            if not self._taken[peer]:
                del self._taken[peer]

    def _refusal(self, limit_of: str, current: int) -> ResourceExhausted:
        whose = "of all peers together" if limit_of == "server" else f"of {limit_of}"
        return ResourceExhausted(
            f"{current} {self._what} {whose} are in progress, which is the limit; end some of them",
            reason="TOO_MANY_CALLS",
            metadata={
                "what": self._what,
                "limit_of": limit_of,
                "current": str(current),
                "at_once": str(current),
            },
            retry_after=_RETRY_AFTER,
        )
