"""Migrations of the schema. Only what migrates imports this, as Alembic takes 0.1 s to import."""

from __future__ import annotations

from importlib.resources import files

from alembic import command
from alembic.config import Config

from outbox_server.shared.database.engine import driver_url


def _config(url: str) -> Config:
    config = Config()
    config.set_main_option(
        "script_location", str(files("outbox_server.shared.database").joinpath("migrations"))
    )
    config.set_main_option("sqlalchemy.url", driver_url(url).replace("%", "%%"))
    return config


def migrate(url: str) -> None:
    """Bring the schema up to date; safe to run from many processes at once."""
    command.upgrade(_config(url), "head")
