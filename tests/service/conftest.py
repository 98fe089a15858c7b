"""The scheduler that most tests of services call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.scheduler_stack import Scheduler


@pytest.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    """A scheduler with the usual settings, and neither senders nor batches."""
    from tests.scheduler_stack import running_scheduler

    async with running_scheduler(database_url, redis_url) as running:
        yield running
