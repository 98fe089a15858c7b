"""The stats process: `python -m outbox_server.services.stats`, `outbox stats`."""

from __future__ import annotations

import sys

from outbox_server.services.starting import run

if __name__ == "__main__":
    sys.exit(run("stats"))
