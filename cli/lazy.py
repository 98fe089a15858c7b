"""A group whose commands are loaded when they are invoked, so that `outbox --help` is quick."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command as command_of

from outbox_server.shared.errors import ConfigurationError, OutboxError

EXIT_FAILED = 1
EXIT_USAGE = 2
# What is missing where one of these libraries is, and the extra that brings it.
_EXTRAS: Final = {
    "aiosmtpd": ("the embedded stack", "local"),
    "plotext": ("the drawing of charts", "cli"),
    "pygal": ("the drawing of charts", "cli"),
}


class CommandFailed(OutboxError):
    """A command did not do what it was asked for; the text is all that the user needs to know."""

    default_reason = "COMMAND_FAILED"


@dataclass(frozen=True, slots=True)
class Entry:
    """A command or group: the module whose `app` it is, and its line in the list of commands."""

    module: str
    help: str
    panel: str


class LazyGroup(TyperGroup):
    """Lists `entries` without importing any of them, and turns errors into a line and a code."""

    entries: ClassVar[Mapping[str, Entry]] = {}

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - typer's signature
        """Return the names in the order of the entries."""
        return list(self.entries)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - typer's signature
        """Return what the list of commands needs to know: `resolve_command` gives the real one."""
        entry = self.entries.get(cmd_name)
        if entry is None:
            return None
        return TyperCommand(cmd_name, help=entry.help, rich_help_panel=entry.panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the command that the first argument names, its module imported."""
        # A name that is almost right is answered with the right one.
        self.commands = {name: self.get_command(ctx, name) for name in self.entries}
        name, stub, rest = super().resolve_command(ctx, args)
        if name is None or stub is None:
            return name, stub, rest
        module = importlib.import_module(self.entries[name].module)
        command = command_of(module.app)
        command.name = name
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error of ours is one line on stderr and an exit code."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            library = (error.name or "").partition(".")[0]
            if library not in _EXTRAS:
                raise
            missing, extra = _EXTRAS[library]
            _say(CommandFailed(f"{missing} is not installed: pip install 'outbox[{extra}]'"))
            raise typer.Exit(EXIT_FAILED) from None
        except ConfigurationError as error:
            _say(error)
            raise typer.Exit(EXIT_USAGE) from None
        except OutboxError as error:
            _say(error)
            raise typer.Exit(EXIT_FAILED) from None


def _say(error: OutboxError) -> None:
    sys.stderr.write(f"outbox: {error}\n")
