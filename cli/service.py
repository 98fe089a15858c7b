"""Running one service in this process, as `python -m services.NAME` does."""

from __future__ import annotations

import asyncio
import importlib

import typer

from shared.logs import configure_logging
from shared.process import run_service
from shared.settings import load_settings


def run(name: str) -> None:
    """Run a service until SIGTERM or Ctrl-C, with its settings from OUTBOX_*.

    Raises:
        typer.Exit: always, with the service's exit code.
    """
    # Here and not above: a client command of the same module needs none of the service.
    server = importlib.import_module(f"services.{name}.server")

    async def main(stop: asyncio.Event) -> None:
        settings = load_settings()
        configure_logging(settings)
        await server.serve(settings, stop)

    raise typer.Exit(run_service(main))
