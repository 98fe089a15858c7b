"""The `outbox` command: the list of its commands, without importing their modules."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Mapping
from typing import Annotated, ClassVar

import typer

from outbox_server.cli.client_options import OptionsBeforeCommand
from outbox_server.cli.lazy import Entry, LazyGroup
from outbox_server.cli.option_groups import with_option_groups
from outbox_server.cli.terminal import note, say

_SYSTEM = "The complete system on this machine"
_CLIENT = "Client commands: one group per service, one command per method"
_SERVICES = "Services, one process each, and their administration"


class OutboxGroup(LazyGroup):
    """The commands of `outbox`."""

    entries: ClassVar[Mapping[str, Entry]] = {
        "demo": Entry(
            "outbox_server.cli.demo",
            "Show the complete system in about a minute: send a CSV as paced mail.",
            _SYSTEM,
        ),
        "up": Entry("outbox_server.cli.up", "Run the complete system on this machine.", _SYSTEM),
        "audit": Entry(
            "outbox_server.cli.audit",
            "Check that every limit was kept and no mail was lost.",
            _SYSTEM,
        ),
        "drill": Entry(
            "outbox_server.cli.drill",
            "Kill parts of a private system at random, then audit it.",
            _SYSTEM,
        ),
        "schedule": Entry(
            "outbox_server.cli.schedule", "Upload a CSV of recipients as a batch.", _CLIENT
        ),
        "senders": Entry(
            "outbox_server.cli.senders",
            "Create, show, update, test, pause and delete senders.",
            _CLIENT,
        ),
        "batches": Entry(
            "outbox_server.cli.batches",
            "Show, watch, pause, change and cancel batches.",
            _CLIENT,
        ),
        "jobs": Entry(
            "outbox_server.cli.jobs",
            "Show, watch, export, explain, cancel and retry e-mail jobs.",
            _CLIENT,
        ),
        "top": Entry(
            "outbox_server.cli.top",
            "Watch senders live: limits, waiting mail and reasons.",
            _CLIENT,
        ),
        "suppressions": Entry(
            "outbox_server.cli.suppressions",
            "Manage the addresses that mail must never go to.",
            _CLIENT,
        ),
        "webhooks": Entry(
            "outbox_server.cli.webhooks",
            "Manage the URLs to which changes of jobs are posted.",
            _CLIENT,
        ),
        "erase": Entry(
            "outbox_server.cli.erase", "Erase what is stored about one recipient.", _CLIENT
        ),
        "keys": Entry(
            "outbox_server.cli.keys",
            "Create, list and revoke API keys; manage encryption keys.",
            _SERVICES,
        ),
        "api-keys": Entry(
            "outbox_server.cli.api_keys",
            "Create, show and revoke API keys over gRPC (operators only).",
            _CLIENT,
        ),
        "users": Entry(
            "outbox_server.cli.users",
            "Show users, and change their quotas, limits and sender domains.",
            _SERVICES,
        ),
        "settings": Entry(
            "outbox_server.cli.settings",
            "Show and change the settings that all processes share.",
            _SERVICES,
        ),
        "held": Entry(
            "outbox_server.cli.held",
            "Show, release and cancel what is held after a restore.",
            _SERVICES,
        ),
        "audit-events": Entry(
            "outbox_server.cli.audit_events", "Show who changed what.", _SERVICES
        ),
        "scheduler": Entry("outbox_server.cli.scheduler", "Run the scheduler.", _SERVICES),
        "dispatcher": Entry(
            "outbox_server.cli.dispatcher",
            "Run a dispatcher, or query running ones (status, list, drain).",
            _SERVICES,
        ),
        "stats": Entry(
            "outbox_server.cli.stats",
            "Run the stats service, or query a running one (sender, user, ...).",
            _SERVICES,
        ),
        "gateway": Entry(
            "outbox_server.cli.gateway",
            "Run Envoy in front of the services: REST and gRPC-Web.",
            _SERVICES,
        ),
        "migrate": Entry(
            "outbox_server.cli.migrate", "Update the database schema to this version.", _SERVICES
        ),
        "version": Entry(
            "outbox_server.cli.version",
            "Show the version of this command and of the servers.",
            _SERVICES,
        ),
        "health": Entry(
            "outbox_server.cli.health", "Ask a service whether it is ready, or alive.", _SERVICES
        ),
        "purge": Entry(
            "outbox_server.cli.purge",
            "Remove finished jobs that are older than the retention.",
            _SERVICES,
        ),
    }


app = typer.Typer(
    cls=OutboxGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    # Tracebacks are plain and without local variables, which may contain secrets.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"outbox {importlib.metadata.version('outbox')}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 success, 1 failure, 2 usage error.\n\n"
    "Client commands connect to the `outbox up` of the current folder (.outbox/), unless --server "
    "or OUTBOX_SCHEDULER_LISTEN, OUTBOX_STATS_LISTEN or OUTBOX_DISPATCHER_LISTEN names an address."
    "\n\nA secret can be read from a file: OUTBOX_DATABASE_URL_FILE, OUTBOX_REDIS_URL_FILE, "
    "OUTBOX_SMTP_URL_FILE, OUTBOX_ENCRYPTION_KEYS_FILE, OUTBOX_API_KEY_FILE."
)
@with_option_groups
def _outbox(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
    before: OptionsBeforeCommand,
) -> None:
    """Accepts e-mail by gRPC, sends it by SMTP within each sender's limits, and loses none.

    [bold]outbox demo[/bold] shows how it works; [bold]outbox up[/bold] runs it on this machine.
    """
    # The callback has printed the version, and the group moves the other options to the command.
    del version, before


def main() -> None:
    """Run the command line. This is the entry point of the console script."""
    # grpc reads this at import. Without it, grpc warns that it skips its fork handlers whenever we
    # start a server while a channel is open. None of our child processes uses the parent's grpc.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # Without it, grpc prints its own line about each failed TLS handshake.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    _warn_about_unknown_settings()
    app(prog_name="outbox")


def _warn_about_unknown_settings() -> None:
    """Warn about variables that are not settings. A service logs them itself."""
    if sys.argv[1:2] in [["scheduler"], ["dispatcher"], ["stats"]]:
        return
    if any(name.startswith("OUTBOX_") for name in os.environ):
        # Imported here, because most calls for help have no such variable.
        from outbox_server.shared.unknown_settings import unknown_settings

        for warning in unknown_settings(os.environ):
            note(f"warning: {warning}")
