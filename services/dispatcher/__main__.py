"""`python -m services.dispatcher`: settings, logs, signals, start."""

from __future__ import annotations

import asyncio
import sys

from services.dispatcher.server import serve
from shared.logs import configure_logging
from shared.process import run_service
from shared.settings import load_settings


async def _main(stop: asyncio.Event) -> None:
    settings = load_settings()
    configure_logging(settings)
    await serve(settings, stop)


if __name__ == "__main__":
    sys.exit(run_service(_main))
