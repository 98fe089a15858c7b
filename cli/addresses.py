"""Finds the address of a service: by option, variable, the stack of this folder, or the default."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from outbox_server.cli.connection_check import SERVERS
from outbox_server.cli.lazy import CommandFailed
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import load_settings

ENDPOINTS: Final = Path(".outbox/endpoints.json")
_DEFAULT: Final = "the default"
# IPv6 addresses are in brackets.
_HOST_PORT: Final = re.compile(r"(\[[^\[\]]+\]|[^:/\[\]]+):(\d{1,5})")
# Other forms of address that gRPC accepts.
_GRPC_SCHEMES: Final = ("unix:", "dns:", "ipv4:", "ipv6:")
_LAST_PORT: Final = 65535


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a service, and the option, variable or file that it comes from."""

    target: str
    origin: str
    service: str
    # The file with an API key for this stack, unless the caller has another key.
    key_file: Path | None = None

    def __str__(self) -> str:
        """Return the address with its origin, as it appears in messages."""
        return f"{self.target} ({self.origin})"

    @property
    def host_and_port(self) -> tuple[str, int] | None:
        """The host, without brackets, and the port; None for another form, such as `unix:`."""
        found = _HOST_PORT.fullmatch(self.target)
        return (found[1].strip("[]"), int(found[2])) if found else None

    @property
    def title(self) -> str:
        """The name of the service in a sentence."""
        return SERVERS[self.service][0]

    @property
    def fix(self) -> str:
        """The advice if no server of this service is at the address."""
        start = f"start the {self.title} there"
        if self.origin in (_DEFAULT, str(ENDPOINTS)):
            start = "start `outbox up` in this folder"
        return f"{start}, or {self.correction}"

    @property
    def correction(self) -> str:
        """The advice if the address is wrong."""
        name = self.origin if self.origin.startswith("OUTBOX_") else "--server"
        return f"name the address of the {self.title} with {name}"


def find_address(service: str, server: str | None) -> Address:
    """Return the address of `service`: `scheduler`, `dispatcher` or `stats`.

    The first of these that is set: `server`, OUTBOX_..._LISTEN, the stack of `outbox up` in this
    folder, the default.

    Raises:
        CommandFailed: the file of `outbox up` cannot be read.
        ConfigurationError: a variable is invalid, or the address is not host:port.
    """
    if server:
        return _checked(Address(server, "--server", service))
    settings = load_settings()
    field = f"{service}_listen"
    listen = reachable(getattr(settings, field))
    if field in settings.model_fields_set:
        return _checked(Address(listen, f"OUTBOX_{field.upper()}", service))
    stack = read_endpoints()
    if stack is not None:
        found = stack["dispatchers"][0] if service == "dispatcher" else stack[service]
        return Address(found, str(ENDPOINTS), service, key_file_of(stack))
    return Address(listen, _DEFAULT, service)


def read_endpoints() -> dict[str, Any] | None:
    """Return the addresses that `outbox up` wrote in this folder, or None if it does not run here.

    Raises:
        CommandFailed: the file cannot be read, is not JSON, or belongs to another user.
    """
    try:
        with ENDPOINTS.open(encoding="utf-8") as file:
            owner = os.fstat(file.fileno()).st_uid
            found: dict[str, Any] = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CommandFailed(f"{ENDPOINTS} cannot be read: {error}") from None
    # In a folder that others may write to, anyone can put such a file.
    if owner not in (os.geteuid(), 0):
        raise CommandFailed(
            f"{ENDPOINTS} belongs to user {owner}, who could redirect this call: use another "
            "folder, or name the server with --server"
        )
    return found


def key_file_of(stack: dict[str, Any]) -> Path | None:
    """Return the file with the operator's API key of a stack; None if its callers need none."""
    return Path(stack["api_key_file"]) if stack.get("api_key_file") else None


def dispatcher_addresses(servers: Sequence[str]) -> list[Address]:
    """Return the addresses of `servers`, or if there are none, of all known dispatchers.

    `outbox up` may run several; OUTBOX_DISPATCHER_LISTEN is the address of one.

    Raises:
        CommandFailed, ConfigurationError: see `find_address`.
    """
    if servers:
        return [find_address("dispatcher", server) for server in servers]
    first = find_address("dispatcher", None)
    if first.origin != str(ENDPOINTS):
        return [first]
    targets = (read_endpoints() or {}).get("dispatchers", [first.target])
    return [replace(first, target=target) for target in targets]


def _checked(address: Address) -> Address:
    """Return the address unchanged if it is valid.

    Raises:
        ConfigurationError: the address is not host:port.
    """
    found = address.host_and_port
    if found is not None and 0 < found[1] <= _LAST_PORT:
        return address
    if address.target.startswith(_GRPC_SCHEMES):
        return address
    raise ConfigurationError(
        f"{address.origin}: {address.target!r} is not HOST:PORT, such as 127.0.0.1:50051; "
        "write an IPv6 address in brackets, and leave out http://"
    )


def reachable(listen: str) -> str:
    """Return the address that reaches a local listener: loopback for one on all addresses."""
    host, _, port = listen.rpartition(":")
    loopback = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - connected to, not bound
    return f"{loopback.get(host, host)}:{port}" if host else listen
