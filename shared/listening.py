"""Addresses that servers listen on."""

from __future__ import annotations

import re
from typing import Final

from outbox_server.shared.errors import ConfigurationError

_ADDRESS: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]\s]+):(\d{1,5})")
_HIGHEST_PORT: Final = 65_535


def check_listen_address(variable: str, listen: str, *, example: str = "127.0.0.1:50051") -> None:
    """Check that `listen` is `host:port`. The error names the setting `variable`.

    Raises:
        ConfigurationError: it is not.
    """
    found = _ADDRESS.fullmatch(listen)
    if found is None or int(found[2]) > _HIGHEST_PORT:
        port = example.rpartition(":")[2]
        examples = dict.fromkeys((example, f"0.0.0.0:{port}", f"[::1]:{port}"))
        *first, last = examples
        raise ConfigurationError(
            f"{variable}: {listen!r} is not an address; write host:port, such as "
            f"{', '.join(first)} or {last}"
        )


def cannot_bind(variable: str, listen: str) -> ConfigurationError:
    """Return the error of an address that cannot be bound; `variable` is its setting."""
    return ConfigurationError(
        f"{variable}: {listen} cannot be bound: another process uses it, or it is not an address "
        "of this machine"
    )


def host_and_port(listen: str) -> tuple[str, int]:
    """Return the host, without brackets, and the port of a checked address."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)
