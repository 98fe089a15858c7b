"""Where SMTP endpoints that users name may lead: never into the operator's own network.

A name is looked up once, each address is judged, and the connection is opened to an address that
was judged: a name that answers otherwise a moment later (DNS rebinding) changes nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import Settings

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
# One answer of getaddrinfo: family, type, protocol, canonical name, socket address.
_Found: TypeAlias = tuple[int, int, int, str, tuple[Any, ...]]

# IANA's special-purpose registry (RFC 6890 and its updates), in full rather than by Python's
# `is_global`, whose answers differ between patch releases.
_REFUSED_V4: Final = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",  # this network; 0.0.0.0 reaches the own host
            "10.0.0.0/8",
            "100.64.0.0/10",  # CGNAT, and Alibaba's metadata
            "127.0.0.0/8",
            "169.254.0.0/16",  # link-local, and most clouds' metadata
            "168.63.129.16/32",  # Azure's metadata, a public address
            "172.16.0.0/12",
            "192.0.0.0/24",  # protocol assignments, and Oracle's metadata
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and broadcast
        ),
    )
)
# What is not global unicast is refused whatever it is: loopback, link-local, unique local (AWS's
# metadata among them), multicast, unspecified, NAT64 for local use.
_GLOBAL_V6: Final = ipaddress.IPv6Network("2000::/3")
_REFUSED_V6: Final = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # protocol assignments, Teredo among them
            "2001:db8::/32",
            "3fff::/20",
        ),
    )
)
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")


class EgressRefused(OSError):
    """An endpoint that a user named leads where it may not; no packet was sent there."""


class Egress:
    """Judges addresses; `allow` lists networks (CIDR), addresses and host names that may be."""

    def __init__(self, allow: Sequence[str] = ()) -> None:
        """Read the list of OUTBOX_SMTP_ALLOW.

        Raises:
            ConfigurationError: an entry is neither a network nor a host name.
        """
        networks: list[_Network] = []
        hosts: set[str] = set()
        for entry in filter(None, map(str.strip, allow)):
            network = _network(entry)
            if network is None:
                hosts.add(_folded(entry))
            else:
                networks.append(network)
        self._networks = tuple(networks)
        self._hosts = frozenset(hosts)

    @classmethod
    def from_settings(cls, settings: Settings) -> Egress:
        """Read OUTBOX_SMTP_ALLOW.

        Raises:
            ConfigurationError: an entry is neither a network nor a host name.
        """
        return cls(settings.smtp_allow.split(","))

    def allows(self, host: str, address: str) -> bool:
        """Say whether a connection to `address`, which `host` was resolved to, may be opened."""
        if _folded(host) in self._hosts:
            return True
        reached = _reached(ipaddress.ip_address(address.partition("%")[0]))
        return any(reached in network for network in self._networks) or _is_public(reached)

    async def connect(self, host: str, port: int) -> socket.socket:
        """Return a socket that is connected to an address of `host` that may be.

        Has no time limit of its own.

        Raises:
            EgressRefused: none of the host's addresses may be.
            OSError: there is no such host, or none of its addresses answers.
        """
        allowed = await self._judged(host, port)
        failure: OSError | None = None
        for family, kind, protocol, _, address in allowed:
            try:
                return await _open(family, kind, protocol, address)
            except OSError as error:
                failure = error
        raise OSError(f"no connection to {host}, port {port}: {failure}") from failure

    async def judged_addresses(self, host: str, port: int) -> list[str]:
        """Return the permitted addresses of `host`, at least one.

        This is for code that opens its own connections. It must connect to one of these addresses,
        and must not look the name up again.

        Raises:
            EgressRefused: none of the host's addresses is permitted.
            OSError: there is no such host.
        """
        return [str(found[4][0]) for found in await self._judged(host, port)]

    async def _judged(self, host: str, port: int) -> Sequence[_Found]:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise OSError(f"{host} cannot be resolved: {error.strerror}") from None
        allowed = [one for one in found if self.allows(host, str(one[4][0]))]
        if not allowed:
            # Without the address: users are not told what the operator's names stand for.
            raise EgressRefused(
                f"{host} leads into the operator's network, where a sender's endpoint may not; the "
                "operator can list it in OUTBOX_SMTP_ALLOW"
            )
        return allowed


async def _open(
    family: int, kind: int, protocol: int, address: tuple[object, ...]
) -> socket.socket:
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setblocking(False)
        await asyncio.get_running_loop().sock_connect(opened, address)
    except BaseException:
        opened.close()
        raise
    return opened


def _reached(address: Address) -> Address:
    """Return where a packet to `address` arrives: an IPv6 address may stand for an IPv4 one."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    inner = address.ipv4_mapped or address.sixtofour
    if inner is None and address in _NAT64:
        inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address if inner is None else inner


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _REFUSED_V4)
    return address in _GLOBAL_V6 and not any(address in network for network in _REFUSED_V6)


def _network(entry: str) -> _Network | None:
    """Return the network that an entry names; None: it is a host name.

    Raises:
        ConfigurationError: it can be neither.
    """
    try:
        return ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        if "/" in entry or ":" in entry or any(char.isspace() for char in entry):
            raise ConfigurationError(
                f"OUTBOX_SMTP_ALLOW: {entry!r} is no network, address or host name; write "
                "10.1.0.0/16, fd00::/8, 10.1.2.3 or mail.internal, separated by commas"
            ) from None
        return None


def _folded(host: str) -> str:
    return host.rstrip(".").casefold()
