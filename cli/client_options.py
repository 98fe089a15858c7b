"""The options that all client commands share. They may stand before or after the command's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Annotated, Any, Final

import typer
from typer.main import get_command as command_of

from outbox_server.cli.option_groups import with_option_groups
from outbox_server.shared.durations import parse_duration

# A command that has an option with this panel connects to a service, so it gets the options below.
CONNECTION_PANEL: Final = "Connection"
_BEFORE: Final = "Options for client commands (before or after the command)"


def _read_timeout(text: str) -> timedelta:
    try:
        timeout = parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if timeout <= timedelta(0):
        raise typer.BadParameter("must be above 0s")
    return timeout


def _option(flag: str, metavar: str, text: str, **more: Any) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, rich_help_panel=CONNECTION_PANEL, **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionOptions:
    """How a command connects to a service. None means that the corresponding variable applies."""

    api_key_file: Annotated[
        str | None,
        _option("--api-key-file", "FILE", "File containing the API key (default: OUTBOX_API_KEY)."),
    ] = None
    # A PEM file, or `system`.
    tls_ca: Annotated[
        str | None,
        _option("--tls-ca", "FILE|system", "Use TLS and trust this CA (default: OUTBOX_TLS_CA)."),
    ] = None
    tls_cert: Annotated[
        str | None,
        _option(
            "--tls-cert",
            "FILE",
            "Client certificate for mutual TLS (default: OUTBOX_TLS_CLIENT_CERTIFICATE).",
        ),
    ] = None
    tls_key: Annotated[
        str | None,
        _option("--tls-key", "FILE", "Private key of --tls-cert (default: OUTBOX_TLS_CLIENT_KEY)."),
    ] = None
    timeout: Annotated[
        timedelta | None,
        _option(
            "--timeout",
            "DURATION",
            "Limit of each call with its retries (default: 30s, or 5m if it may change many rows; "
            "uploads 1h; watches none).",
            parser=_read_timeout,
        ),
    ] = None


_NONE: Final = ConnectionOptions()
connection_options: Final[ContextVar[ConnectionOptions]] = ContextVar(
    "connection_options", default=_NONE
)


def _before(flag: str, metavar: str, text: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, rich_help_panel=_BEFORE)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionsBeforeCommand:
    """The same options before the command's name, as texts that the command's own options parse."""

    user: Annotated[
        str | None, _before("--user", "ID", "Owner; required with a service or operator key.")
    ] = None
    server: Annotated[str | None, _before("--server", "HOST:PORT", "Server address.")] = None
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="table|json",
            help="With json, stdout holds one JSON document; an error is one on stderr.",
            rich_help_panel=_BEFORE,
        ),
    ] = None
    api_key_file: Annotated[
        str | None, _before("--api-key-file", "FILE", "File containing the API key.")
    ] = None
    tls_ca: Annotated[
        str | None, _before("--tls-ca", "FILE|system", "Use TLS and trust this CA.")
    ] = None
    tls_cert: Annotated[
        str | None, _before("--tls-cert", "FILE", "Client certificate for mutual TLS.")
    ] = None
    tls_key: Annotated[str | None, _before("--tls-key", "FILE", "Private key of --tls-cert.")] = (
        None
    )
    timeout: Annotated[str | None, _before("--timeout", "DURATION", "Limit of each call.")] = None


_FLAGS: Final = {
    "user": "--user",
    "server": "--server",
    "output": "--output",
    "api_key_file": "--api-key-file",
    "tls_ca": "--tls-ca",
    "tls_cert": "--tls-cert",
    "tls_key": "--tls-key",
    "timeout": "--timeout",
}
_SHORT: Final = {"-o": "--output"}
# Commands that connect to nothing ignore these, so that a script may always give them.
_IGNORED: Final = frozenset({"--api-key-file", "--tls-ca", "--tls-cert", "--tls-key", "--timeout"})

_reader = typer.Typer(add_completion=False)


@_reader.command()
@with_option_groups
def _read(*, options: ConnectionOptions) -> None:
    connection_options.set(options)


def add_connection_options(command: Any) -> None:
    """Add the options of `ConnectionOptions` to `command`, or to all in it, if they connect."""
    for inner in getattr(command, "commands", {}).values():
        add_connection_options(inner)
    if not any(getattr(one, "rich_help_panel", None) == CONNECTION_PANEL for one in command.params):
        return
    reader = command_of(_reader)
    shared = [
        one
        for one in reader.params
        if one.name in {each.name for each in fields(ConnectionOptions)}
    ]
    read: Any = reader.callback
    run = command.callback

    def connected(**given: Any) -> Any:
        read(**{one.name: given.pop(one.name) for one in shared})
        return run(**given)

    command.params = [*command.params, *shared]
    command.callback = connected


def place_options(
    command: Any, before: Mapping[str, str | None], words: Sequence[str]
) -> list[str]:
    """Return the words of `command` with the options that stand before its name moved behind it.

    `before` are the values of `OptionsBeforeCommand`. A value after the name wins, since it comes
    last.

    Raises:
        typer.BadParameter: the command has no such option.
    """
    given = {_FLAGS[name]: text for name, text in before.items() if name in _FLAGS and text}
    rest, path = list(words), [command.name]
    while inner := getattr(command, "commands", None):
        rest = list(_taken(rest, given))
        if not rest or rest[0] not in inner:
            break
        path.append(rest.pop(0))
        command = inner[path[-1]]
    known = {flag for parameter in command.params for flag in parameter.opts}
    placed = []
    for flag, text in given.items():
        if flag in known:
            placed += [flag, text]
        elif flag not in _IGNORED and not getattr(command, "commands", None):
            raise typer.BadParameter(f"`{' '.join(path)}` has no such option", param_hint=flag)
    return [*path[1:], *placed, *rest]


def _taken(words: list[str], given: dict[str, str]) -> Iterator[str]:
    """Move the shared options at the start of `words` to `given`, and yield the other words."""
    rest = iter(words)
    for word in rest:
        flag, is_joined, text = word.partition("=")
        if word[:2] in _SHORT and len(word) > len("-o"):
            flag, is_joined, text = word[:2], "=", word[2:]
        flag = _SHORT.get(flag, flag)
        if flag not in _FLAGS.values():
            yield word
            yield from rest
            return
        value = text if is_joined else next(rest, None)
        if value is None:
            raise typer.BadParameter("requires a value", param_hint=flag)
        given[flag] = value
