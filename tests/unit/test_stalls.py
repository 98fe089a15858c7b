from __future__ import annotations

import asyncio
import time

from prometheus_client import CollectorRegistry

from outbox_server.shared.metrics.stalls import StallWatch
from tests.eventually import eventually

LONGEST = "outbox_event_loop_longest_stall_seconds"


def test_the_longest_stall_is_shown_for_one_to_two_minutes() -> None:
    now = 0.0
    registry = CollectorRegistry()
    watch = StallWatch(registry, lambda: now)
    watch.record(3.0)
    watch.record(0.5)
    assert registry.get_sample_value(LONGEST) == 3.0
    now = 100.0
    watch.record(1.0)
    assert registry.get_sample_value(LONGEST) == 3.0
    now = 130.0
    assert registry.get_sample_value(LONGEST) == 1.0
    now = 500.0
    assert registry.get_sample_value(LONGEST) == 0.0


async def test_a_blocked_event_loop_is_measured() -> None:
    registry = CollectorRegistry()
    watch = StallWatch(registry)
    watching = asyncio.create_task(watch.run())
    await eventually(lambda: registry.get_sample_value("outbox_event_loop_stall_seconds_count"))
    time.sleep(0.4)  # noqa: ASYNC251 - this is what is measured
    await eventually(lambda: (registry.get_sample_value(LONGEST) or 0) >= 0.25)
    watching.cancel()
