"""The scheduler process: `python -m services.scheduler`, `outbox scheduler`."""

from __future__ import annotations

import sys

from services.scheduler.server import serve
from shared.process import run_with_settings

if __name__ == "__main__":
    sys.exit(run_with_settings(serve))
