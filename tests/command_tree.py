"""All commands of the command line, found by walking its groups."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

from typer.main import get_command as command_of

from outbox_server.cli.client_options import add_connection_options
from outbox_server.cli.main import OutboxGroup


def command(name: str) -> Any:
    """Return a command as the command line loads it."""
    found = command_of(importlib.import_module(OutboxGroup.entries[name].module).app)
    found.name = name
    add_connection_options(found)
    return found


def leaves(found: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the commands below a group, each with its words."""
    inner = getattr(found, "commands", {})
    if not inner or getattr(found, "invoke_without_command", False):
        yield path, found
    for name, each in inner.items():
        yield from leaves(each, f"{path} {name}")


def flags(found: Any) -> set[str]:
    """Return all spellings of the options of a command."""
    return {flag for each in found.params for flag in each.opts}


ALL = [leaf for name in OutboxGroup.entries for leaf in leaves(command(name), name)]
# Probes, services and commands that talk to the stores themselves.
NOT_CLIENTS = {"health"}


def examples() -> Iterator[tuple[str, str]]:
    """Yield each example in `--help`, with the words of its command, as it is printed."""
    for path, found in ALL:
        for paragraph in re.split(r"\n\s*\n", found.help or ""):
            if paragraph.startswith("$ "):
                yield path, paragraph.removeprefix("$ ")
