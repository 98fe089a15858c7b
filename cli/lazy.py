"""A command group that loads a command only when it is invoked, so that `outbox --help` is fast."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command as command_of

from outbox_server.cli.client_options import add_connection_options, place_options
from outbox_server.cli.failures import as_json, asks_for_json, report, report_usage, reword
from outbox_server.cli.flags import remember_flags
from outbox_server.shared.errors import ConfigurationError, OutboxError

EXIT_FAILED = 1
EXIT_USAGE = 2
# For each optional library: the feature that needs it, and the extra that installs it.
_EXTRAS: Final = {
    "aiosmtpd": ("the embedded stack", "local"),
    "plotext": ("chart drawing", "cli"),
    "pygal": ("chart drawing", "cli"),
}


class CommandFailed(OutboxError):
    """A command failed. The text tells the user all that they need to know.

    `details` replace fields of the JSON document of an error: what the failed call said.
    """

    default_reason = "COMMAND_FAILED"

    def __init__(self, message: str, *, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.details = dict(details or {})


@dataclass(frozen=True, slots=True)
class Entry:
    """A command or group: the module that contains its `app`, and its line in the command list."""

    module: str
    help: str
    panel: str


class LazyGroup(TyperGroup):
    """Lists `entries` without importing them, and turns errors into one line and an exit code."""

    entries: ClassVar[Mapping[str, Entry]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of the entries."""
        del ctx
        return list(self.entries)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a stub for the command list. `resolve_command` returns the real command."""
        del ctx
        entry = self.entries.get(cmd_name)
        if entry is None:
            return None
        return TyperCommand(cmd_name, help=entry.help, rich_help_panel=entry.panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Import and return the command that the first argument names."""
        # With this, a misspelled name is answered with the closest command.
        self.commands = {name: self.get_command(ctx, name) for name in self.entries}
        name, stub, rest = super().resolve_command(ctx, args)
        if name is None or stub is None:
            return name, stub, rest
        module = _import(self.entries[name].module)
        command = command_of(module.app)
        command.name = name
        add_connection_options(command)
        rest = place_options(command, getattr(ctx, "params", {}), rest)
        remember_flags(command, rest)
        return name, command, rest

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **more: Any,
    ) -> Any:
        """Run the command line. With `-o json`, a wrong command line is a JSON document too."""
        words = sys.argv[1:] if args is None else list(args)
        as_json.set(asks_for_json(words))
        if not (as_json.get() and standalone_mode):
            return super().main(
                args, prog_name, complete_var, standalone_mode, windows_expand_args, **more
            )
        try:
            code = super().main(words, prog_name, complete_var, standalone_mode=False, **more)
        except typer.Abort:
            code = EXIT_FAILED
        except typer.TyperException as error:
            report_usage(getattr(error, "format_message", error.__str__)())
            code = EXIT_USAGE
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Our own errors become one line on stderr and an exit code."""
        try:
            return super().invoke(ctx)
        except typer.TyperException as error:
            reword(error)
            raise
        except ModuleNotFoundError as error:
            library = (error.name or "").partition(".")[0]
            if library not in _EXTRAS:
                raise
            missing, extra = _EXTRAS[library]
            report(CommandFailed(f"{missing} is not installed: pip install 'outbox[{extra}]'"))
            raise typer.Exit(EXIT_FAILED) from None
        except ConfigurationError as error:
            report(error)
            raise typer.Exit(EXIT_USAGE) from None
        except OutboxError as error:
            report(error)
            raise typer.Exit(EXIT_FAILED) from None


def _import(name: str) -> Any:
    """Import a module without garbage collections, since modules are never garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if collects:
            gc.enable()
