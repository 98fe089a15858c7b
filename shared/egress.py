"""Restricts outgoing connections: users' endpoints cannot reach the operator's network.

A name is resolved once, each address is checked, and the connection is opened to a checked
address. So DNS rebinding (another address at a second lookup) has no effect.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import ssl
from collections.abc import Sequence
from typing import Final, TypeAlias

from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.name_lookup import NameResolver
from outbox_server.shared.settings import Settings
from outbox_server.shared.smtp_ports import PermittedPorts

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

# IANA's special-purpose registry (RFC 6890 and its updates). It is listed here because the results
# of Python's `is_global` differ between patch releases.
_REFUSED_V4: Final = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",  # this network; 0.0.0.0 reaches this host
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
# All addresses outside global unicast are refused: loopback, link-local, unique local (including
# AWS's metadata), multicast, unspecified, NAT64 for local use.
_GLOBAL_V6: Final = ipaddress.IPv6Network("2000::/3")
_REFUSED_V6: Final = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # protocol assignments, including Teredo
            "2001:db8::/32",
            "3fff::/20",
        ),
    )
)
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")

# How many causes of an error are looked at.
_MOST_CAUSES: Final = 8


class EgressRefused(OSError):
    """A user's endpoint has a forbidden address or port. No packet was sent there."""


class Egress:
    """Resolves users' host names, checks the addresses, and connects."""

    def __init__(
        self,
        allow: Sequence[str] = (),
        resolver: NameResolver | None = None,
        ports: PermittedPorts | None = None,
        *,
        setting: str = "OUTBOX_SMTP_ALLOW",
    ) -> None:
        """Read `allow`, the list of `setting`: networks (CIDR), addresses, host names.

        `ports` None means any port.

        Raises:
            ConfigurationError: an entry is neither a network nor a host name.
        """
        networks: list[_Network] = []
        hosts: set[str] = set()
        for entry in filter(None, map(str.strip, allow)):
            network = _network(entry, setting)
            if network is None:
                hosts.add(_folded(entry))
            else:
                networks.append(network)
        self._networks = tuple(networks)
        self._hosts = frozenset(hosts)
        self._resolver = resolver or NameResolver()
        self.ports = ports or PermittedPorts()

    @classmethod
    def from_settings(cls, settings: Settings) -> Egress:
        """Read OUTBOX_SMTP_ALLOW and OUTBOX_SMTP_PORTS.

        Raises:
            ConfigurationError: one of them is malformed.
        """
        ports = PermittedPorts(settings.smtp_ports)
        return cls(settings.smtp_allow.split(","), ports=ports)

    def allows(self, host: str, address: str) -> bool:
        """Return whether a connection to `address`, which `host` resolved to, is permitted."""
        if _folded(host) in self._hosts:
            return True
        reached = _reached(ipaddress.ip_address(address.partition("%")[0]))
        return any(reached in network for network in self._networks) or _is_public(reached)

    def lists(self, host: str) -> bool:
        """Return whether the list has `host`: as a name or, if it is an address, in a network."""
        if _folded(host) in self._hosts:
            return True
        try:
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return False
        return any(address in network for network in self._networks)

    async def connect(self, host: str, port: int, *, user: str) -> socket.socket:
        """Return a socket that is connected to a permitted address of `host`.

        `user` chose the host. The call itself has no time limit.

        Raises:
            EgressRefused: the port, or each of the host's addresses, is not permitted.
            OSError: the host does not exist, or none of its addresses accepts a connection.
        """
        refusal = self.ports.refusal(port)
        if refusal:
            raise EgressRefused(f"the port {refusal}")
        failure: OSError | None = None
        for address in await self.permitted_addresses(host, user=user):
            try:
                return await _open(address, port)
            except OSError as error:
                failure = error
        raise OSError(f"no connection to {host}, port {port}: {reason_of(failure)}") from failure

    async def permitted_addresses(self, host: str, *, user: str) -> Sequence[str]:
        """Return the permitted addresses of `host`, which `user` chose; at least one.

        This is for code that opens its own connections. It must connect to one of these addresses,
        and must not look the name up again.

        Raises:
            EgressRefused: none of the host's addresses is permitted.
            OSError: there is no such host, or its DNS servers gave no answer in time.
        """
        found = await self._resolver.addresses(host, user)
        allowed = [address for address in found if self.allows(host, address)]
        if not allowed:
            # The text omits the address: users must not learn the operator's internal addresses.
            raise EgressRefused(
                f"{host} is in the operator's network, which senders' endpoints must not use; "
                "the operator can permit it in OUTBOX_SMTP_ALLOW"
            )
        return allowed

    async def close(self) -> None:
        """End the look-ups that are under way, before the event loop ends."""
        await self._resolver.close()


def reason_of(error: BaseException | None) -> str:
    """Return why a connection failed.

    The address in the operating system's text and OpenSSL's notation are left out.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason.replace('_', ' ').lower()}" if error.reason else "no TLS"
    if isinstance(error, socket.gaierror):
        return "its name cannot be resolved"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return "the connection failed" if error is None else type(error).__name__


async def _open(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setblocking(False)
        await asyncio.get_running_loop().sock_connect(opened, (address, port))
    except BaseException:
        opened.close()
        raise
    return opened


def _reached(address: Address) -> Address:
    """Return the address that a packet arrives at: an IPv6 address may contain an IPv4 one."""
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


def _network(entry: str, setting: str) -> _Network | None:
    """Return the network of an entry; None if the entry is a host name.

    Raises:
        ConfigurationError: it is neither.
    """
    try:
        return ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        if "/" in entry or ":" in entry or any(char.isspace() for char in entry):
            raise ConfigurationError(
                f"{setting}: {entry!r} is not a network, address or host name; write "
                "10.1.0.0/16, fd00::/8, 10.1.2.3 or mail.internal, separated by commas"
            ) from None
        return None


def _folded(host: str) -> str:
    return host.rstrip(".").casefold()


def text_of(error: BaseException) -> str:
    """Return the text of an error of a library for HTTP; for one of TLS, as `reason_of` does."""
    cause: BaseException | None = error
    for _ in range(_MOST_CAUSES):
        if isinstance(cause, ssl.SSLError):
            return reason_of(cause)
        cause = cause and (cause.__cause__ or cause.__context__)
    return str(error)
