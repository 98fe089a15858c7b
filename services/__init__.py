"""The three services.

Two libraries import others that happen to be installed, and no service uses them: structlog
imports rich, and redis-py OpenTelemetry's metrics. They are hidden while structlog and redis-py are
imported, so that a service starts with less work and memory.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any, Final

_UNUSED: Final[Mapping[str, str]] = {
    "structlog": "rich",
    "redis.asyncio": "opentelemetry.sdk.metrics",
}


def _import_without(library: str, unused: str) -> None:
    modules: dict[str, Any] = sys.modules
    if unused in modules:
        return
    # Python raises ModuleNotFoundError for a module that is None.
    modules[unused] = None
    try:
        importlib.import_module(library)
    finally:
        del modules[unused]


for _library, _hidden in _UNUSED.items():
    _import_without(_library, _hidden)
