"""One gateway for all tests in this folder, in front of services that require API keys."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Stores
from tests.gateway_stack import GatewayStack


@pytest.fixture(scope="session")
def gateway(stores: Stores) -> Iterator[GatewayStack]:
    folder = Path(tempfile.mkdtemp(prefix="outbox-gateway-"))
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        stack = GatewayStack(folder, stores.clone("outbox_gateway"), runner)
        try:
            runner.run(stack.start())
            yield stack
        finally:
            runner.run(stack.stop())
            shutil.rmtree(folder)
