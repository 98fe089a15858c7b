"""Starts the process of a service: `python -m outbox_server.services.NAME`."""

from __future__ import annotations

import gc
import importlib
from typing import Any


def run(service: str) -> int:
    """Import the service called `service`, run it to its end, and return its exit code.

    Garbage collection is off during the imports, because it would take a seventh of the start and
    find nothing. `shared.process.run_service` turns it on.
    """
    gc.disable()
    server: Any = importlib.import_module(f"outbox_server.services.{service}.server")
    process: Any = importlib.import_module("outbox_server.shared.process")
    code: int = process.run_with_settings(server.serve)
    return code
