"""The scheduler process: `python -m outbox_server.services.scheduler`, `outbox scheduler`."""

from __future__ import annotations

import sys

from outbox_server.services.scheduler.server import serve
from outbox_server.shared.process import run_with_settings

if __name__ == "__main__":
    sys.exit(run_with_settings(serve))
