"""Whether the containers can run, and one installation for all tests."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

_BUILT = Path(__file__).parents[2] / "build" / "containers" / "pip.conf"


def pytest_configure(config: pytest.Config) -> None:
    """End the run with one line unless `run.sh` prepared it; nothing is skipped."""
    config.addinivalue_line("markers", "short: also in the short form, `make test-image`")
    if not _BUILT.exists() or [name for _, name in socket.if_nameindex()] != ["lo"]:
        raise pytest.UsageError(
            "the tests need the image, and a network of their own: run `make test-containers`"
        )
