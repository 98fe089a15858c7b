"""`outbox migrate`: updates the database schema."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.options import duration_option
from outbox_server.cli.output import Output, OutputFormat, print_json
from outbox_server.cli.terminal import note

app = typer.Typer(add_completion=False)


@app.command()
def migrate(
    wait: Annotated[
        timedelta,
        duration_option("--wait", "How long to try to get the locks of tables."),
    ] = "10m",  # type: ignore[assignment]  # typer parses defaults
    output: Output = OutputFormat.TABLE,
) -> None:
    """Update the schema of the database in OUTBOX_DATABASE_URL to this version.

    Safe to run at any time, while the services run, and from several
    machines at once: one migrates, the others wait. No step blocks a table
    for longer than a second. If it is interrupted, run it again: finished
    steps are kept.
    """
    # Imported here because SQLAlchemy takes a third of a second, and `--help` does not need it.
    from sqlalchemy.exc import SQLAlchemyError

    from outbox_server.shared.database import migrating
    from outbox_server.shared.settings import load_settings
    from outbox_server.shared.store_urls import place_of

    url = load_settings().database_url
    try:
        done = migrating.migrate(url, say=note, patience=wait)
    except SQLAlchemyError as error:
        cause = " ".join(str(getattr(error, "orig", None) or error).split())
        raise CommandFailed(f"OUTBOX_DATABASE_URL: {cause}") from None
    if output is OutputFormat.JSON:
        print_json(
            {
                "database": place_of(url),
                "revision_before": done.before,
                "revision": done.after,
                "changed": done.before != done.after,
            }
        )
    note(f"the schema of {place_of(url)} is up to date")
