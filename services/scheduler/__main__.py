"""The scheduler process: `python -m services.scheduler`, `outbox scheduler`."""

from __future__ import annotations

import asyncio
import sys

from services.scheduler.server import serve
from shared.logs import configure_logging
from shared.process import run_service
from shared.settings import load_settings


async def _serve(stop: asyncio.Event) -> None:
    settings = load_settings()
    configure_logging(settings)
    await serve(settings, stop)


def main() -> int:
    """Run until SIGTERM or SIGINT; return the exit code (2: a setting is wrong)."""
    return run_service(_serve)


if __name__ == "__main__":
    sys.exit(main())
