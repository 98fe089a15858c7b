"""Writes docs/openapi.json, the document that the gateway serves as /openapi.json: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from outbox_server.deploy.contract import read_descriptors
from outbox_server.deploy.envoy.files import openapi_text

TARGET: Final = Path(__file__).with_name("openapi.json")

if __name__ == "__main__":
    TARGET.write_text(openapi_text(read_descriptors()), encoding="utf-8")
    sys.stderr.write(f"{TARGET} written\n")
