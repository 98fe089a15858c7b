"""The name that Outbox sends in EHLO. Dispatchers and VerifySender use the same."""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Any

from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import Settings

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})+")
_SAYABLE = re.compile(r"[!-~]+")
# Names that a resolver returns for a host that has no name of its own.
_NO_NAME = re.compile(r"(?:.*\.)?(?:localhost|localdomain|arpa)", re.IGNORECASE)


def helo_name(settings: Settings) -> str:
    """Return OUTBOX_SMTP_HELO if it is set, else the host's name if it is fully qualified.

    Otherwise the result is empty: each connection then sends its own address as `address_literal`
    formats it. This function may call the resolver, which can take seconds.

    Raises:
        ConfigurationError: OUTBOX_SMTP_HELO contains a space or a non-ASCII character.
    """
    if settings.smtp_helo:
        if not _may_be_said(settings.smtp_helo):
            raise ConfigurationError(
                "OUTBOX_SMTP_HELO: must be a host name such as mail.example.com, or an address in "
                f"brackets such as [192.0.2.7] (got {settings.smtp_helo!r})"
            )
        return settings.smtp_helo
    name = socket.gethostname()
    if "." not in name:
        name = socket.getfqdn(name)
    return name if is_fully_qualified(name) else ""


def _may_be_said(name: str) -> bool:
    if name.startswith("["):
        address = name.removeprefix("[").removesuffix("]").removeprefix("IPv6:")
        try:
            return name == _literal(ipaddress.ip_address(address))
        except ValueError:
            return False
    return _SAYABLE.fullmatch(name) is not None


def is_fully_qualified(name: str) -> bool:
    """Return whether mail servers that require a fully qualified host name accept this one."""
    if _DOMAIN.fullmatch(name) is None or _NO_NAME.fullmatch(name) is not None:
        return False
    # A numeric last label means an IP address, which is only valid in brackets.
    return not name.rpartition(".")[2].isdigit()


def address_literal(sockname: Any) -> str:
    """Return a socket's own address as an address literal (RFC 5321, 4.1.3): `[192.0.2.7]`."""
    address = ipaddress.ip_address(str(sockname[0]).partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return _literal(address)


def _literal(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    tag = "IPv6:" if isinstance(address, ipaddress.IPv6Address) else ""
    return f"[{tag}{address}]"
