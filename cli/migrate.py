"""`outbox migrate`: updates the database schema."""

from __future__ import annotations

import typer

from outbox_server.cli.lazy import CommandFailed

app = typer.Typer(add_completion=False)


@app.command()
def migrate() -> None:
    """Update the schema of the database in OUTBOX_DATABASE_URL to this version.

    Safe to run at any time, and from several machines at once.
    """
    # Imported here because SQLAlchemy takes a third of a second, and `--help` does not need it.
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    from outbox_server.shared.database import schema
    from outbox_server.shared.settings import load_settings

    url = load_settings().database_url
    try:
        place = make_url(url).render_as_string(hide_password=True)
        schema.migrate(url)
    except SQLAlchemyError as error:
        cause = " ".join(str(getattr(error, "orig", None) or error).split())
        raise CommandFailed(f"OUTBOX_DATABASE_URL: {cause}") from None
    typer.echo(f"the schema of {place} is up to date", err=True)
