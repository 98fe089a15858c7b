"""The `outbox` command: the list of its commands, and nothing that any of them needs."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from outbox_server.cli.client_files import ClientFiles, client_files
from outbox_server.cli.lazy import Entry, LazyGroup

_SYSTEM = "The whole system on this machine"
_CLIENT = "Client: one group a service, one command a method"
_SERVICES = "Services, one process each"
_WHO = "Of client commands; stands before the command"


class OutboxGroup(LazyGroup):
    """The command's list of commands."""

    entries: ClassVar[Mapping[str, Entry]] = {
        "demo": Entry(
            "outbox_server.cli.demo",
            "Show it all in about a minute: a CSV becomes paced mail.",
            _SYSTEM,
        ),
        "up": Entry(
            "outbox_server.cli.up", "Keep the whole system running on this machine.", _SYSTEM
        ),
        "audit": Entry(
            "outbox_server.cli.audit", "Check all that was ever sent against the promises.", _SYSTEM
        ),
        "drill": Entry(
            "outbox_server.cli.drill",
            "Kill the parts of a private stack at random, and audit it.",
            _SYSTEM,
        ),
        "schedule": Entry(
            "outbox_server.cli.schedule", "Upload a CSV of recipients as a batch.", _CLIENT
        ),
        "senders": Entry(
            "outbox_server.cli.senders", "Create, show, change, pause and delete senders.", _CLIENT
        ),
        "batches": Entry("outbox_server.cli.batches", "Show and cancel batches.", _CLIENT),
        "jobs": Entry("outbox_server.cli.jobs", "Show and cancel e-mail jobs.", _CLIENT),
        "top": Entry(
            "outbox_server.cli.top", "Watch senders live: limits, what waits and why.", _CLIENT
        ),
        "suppressions": Entry(
            "outbox_server.cli.suppressions",
            "Keep the addresses that mail must never go to.",
            _CLIENT,
        ),
        "keys": Entry(
            "outbox_server.cli.keys", "Make, list and revoke API keys; encryption keys.", _SERVICES
        ),
        "scheduler": Entry("outbox_server.cli.scheduler", "Run the scheduler.", _SERVICES),
        "dispatcher": Entry(
            "outbox_server.cli.dispatcher",
            "Run a dispatcher; or ask one: status, drain.",
            _SERVICES,
        ),
        "stats": Entry(
            "outbox_server.cli.stats", "Run the stats service; or ask it: sender, user.", _SERVICES
        ),
        "migrate": Entry(
            "outbox_server.cli.migrate", "Bring the database's schema up to date.", _SERVICES
        ),
    }


app = typer.Typer(
    cls=OutboxGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    # A trace is for whoever mends it: plain, without the locals, which may hold secrets.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"outbox {importlib.metadata.version('outbox')}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 ok, 1 failed, 2 usage.\n\n"
    "Client commands find the stack of `outbox up` through .outbox/ of the current folder, "
    "others through OUTBOX_SCHEDULER_LISTEN, OUTBOX_STATS_LISTEN, OUTBOX_DISPATCHER_LISTEN, "
    "or --server."
)
def _outbox(
    *,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            help="File with the API key to show; unset: OUTBOX_API_KEY.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    tls_ca: Annotated[
        str | None,
        typer.Option(
            "--tls-ca",
            metavar="FILE|system",
            help="Use TLS, and trust this CA; unset: OUTBOX_TLS_CA.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            "--tls-cert",
            help="Our certificate for mTLS; unset: OUTBOX_TLS_CLIENT_CERTIFICATE.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(
            "--tls-key",
            help="The key of --tls-cert; unset: OUTBOX_TLS_CLIENT_KEY.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """Schedules e-mail: gRPC in, SMTP out, never faster than a sender's limits, nothing lost.

    [bold]outbox demo[/bold] shows it all; [bold]outbox up[/bold] keeps it running.
    """
    del version  # its callback has printed it
    client_files.set(ClientFiles(api_key_file, tls_ca, tls_cert, tls_key))


def main() -> None:
    """Run the command line; the console script's entry."""
    # grpc reads it when it is imported. Else it says, at every server that is started while a
    # channel is open, that it skips its fork handlers; no child of ours goes on using grpc.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # Else it writes a line of its own about each TLS handshake that fails.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    app(prog_name="outbox")
