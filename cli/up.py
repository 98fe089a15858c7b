"""`outbox up`: the embedded stack, kept running."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cli.client import ENDPOINTS
from cli.foreground import run
from cli.lazy import CommandFailed
from cli.output import Output, OutputFormat, note, print_json
from deploy.local.supervisor import LocalSystem
from shared.errors import OutboxError
from shared.settings import Settings, load_settings

# Set by `up` itself, whatever the environment says.
_OWN: Final = ("database_url", "redis_url", "auth", "tls_certificate", "tls_key")

app = typer.Typer(add_completion=False)


@app.command()
def up(
    dispatchers: Annotated[
        int, typer.Option("--dispatchers", min=1, max=64, help="How many dispatchers run.")
    ] = 1,
    smtp: Annotated[
        str | None,
        typer.Option(
            "--smtp",
            metavar="URL",
            help="Send everything to this relay (smtp://user:password@host:port, smtps://, "
            "smtp+starttls://), in place of the development inbox.",
        ),
    ] = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Keep the whole system running on this machine, until Ctrl-C.

    PostgreSQL, Valkey, a development inbox that takes every mail, the
    scheduler, the stats service and the dispatchers, all on loopback; the
    data is kept in .outbox/ of this folder. What dies is started again.

    Ports are the usual ones, or free ones where those are taken. OUTBOX_*
    variables reach the services: OUTBOX_MIN_GAP, OUTBOX_RATE_WINDOW, ...

    $ outbox up --dispatchers 2
    """
    settings = load_settings()
    _tell_of_unused(settings, smtp)
    run(lambda: _hold(settings, dispatchers, smtp, output), lambda: note("stopping ..."))


async def _hold(
    settings: Settings, dispatchers: int, smtp: str | None, output: OutputFormat
) -> None:
    began = time.monotonic()
    folder = ENDPOINTS.parent
    folder.mkdir(exist_ok=True)
    # Data, keys and mails are nothing to commit.
    (folder / ".gitignore").write_text("*\n")
    system = LocalSystem(folder, settings, dispatchers=dispatchers, smtp_url=smtp, say=_say)
    note("starting ...")
    async with _starting(system):
        found = endpoints_of(system)
        _write(found)
        try:
            if output is OutputFormat.JSON:
                print_json(found)
            else:
                sys.stdout.write(_welcome(found, smtp))
                sys.stdout.flush()
            note(f"ready after {time.monotonic() - began:.1f} s; Ctrl-C stops everything")
            await system.watch()
        finally:
            ENDPOINTS.unlink(missing_ok=True)


def endpoints_of(system: LocalSystem) -> dict[str, Any]:
    """Return where everything is: what client commands read, and what `up` prints."""
    servers = system.servers
    return {
        "scheduler": system.scheduler,
        "stats": system.stats,
        "dispatchers": system.dispatchers,
        "database_url": servers.database_url,
        "redis_url": servers.redis_url,
        "smtp_url": servers.smtp_url if servers.inbox else None,
        "inbox": str(servers.maildir) if servers.inbox else None,
        "logs": str(system.folder / "logs"),
        "pid": os.getpid(),
    }
