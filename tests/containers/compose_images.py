"""`python -m tests.containers.compose_images`: prints the images that need a stand-in.

One line for each image of compose.yaml that is not ours: the name of its service, and the image.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import yaml

_FILE: Final = Path(__file__).parents[2] / "deploy" / "compose" / "compose.yaml"
# The service `redis` runs Valkey.
_TARGETS: Final = {"redis": "valkey"}

if __name__ == "__main__":
    services = yaml.safe_load(_FILE.read_text(encoding="utf-8"))["services"]
    for name, service in services.items():
        image = service["image"]
        if not image.startswith("outbox:"):
            sys.stdout.write(f"{_TARGETS.get(name, name)} localhost/{image}\n")
