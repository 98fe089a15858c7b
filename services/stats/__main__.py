"""The stats process: `python -m services.stats`, `outbox stats`."""

from __future__ import annotations

import sys

from services.stats.server import serve
from shared.process import run_with_settings

if __name__ == "__main__":
    sys.exit(run_with_settings(serve))
