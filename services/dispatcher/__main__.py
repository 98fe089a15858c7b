"""The dispatcher process: `python -m services.dispatcher`, `outbox dispatcher`."""

from __future__ import annotations

import sys

from services.dispatcher.server import serve
from shared.process import run_with_settings

if __name__ == "__main__":
    sys.exit(run_with_settings(serve))
