"""Runs a service in this process by its module name, since the command line imports no service."""

from __future__ import annotations

import runpy
from typing import NoReturn


def run(name: str) -> NoReturn:
    """Run a service until SIGTERM or Ctrl-C, as `python -m outbox_server.services.NAME` does.

    Raises:
        SystemExit: always, with the service's exit code.
    """
    runpy.run_module(f"outbox_server.services.{name}", run_name="__main__")
    raise SystemExit
