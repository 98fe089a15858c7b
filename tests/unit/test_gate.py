from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from outbox_server.shared.errors import ResourceExhausted
from outbox_server.shared.rpc.gate import Gate
from tests.eventually import PATIENCE, eventually

SOON = timedelta(milliseconds=20)
LATER = timedelta(seconds=30)


class Crowd:
    """Holds places of a gate until it is released."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.inside = 0
        self.most = 0
        self.go = asyncio.Event()

    async def enter(self) -> None:
        async with self.gate.entered():
            self.inside += 1
            self.most = max(self.most, self.inside)
            await self.go.wait()
            self.inside -= 1


async def test_no_more_calls_than_the_limit_run_and_all_waiting_calls_enter() -> None:
    crowd = Crowd(Gate("calls", at_once=3, waiting=7, patience=LATER))
    async with asyncio.TaskGroup() as group:
        for _ in range(10):
            group.create_task(crowd.enter())
        await eventually(lambda: crowd.inside == 3)
        crowd.go.set()
    assert crowd.most == 3


async def test_a_call_beyond_the_queue_is_refused_at_once_with_a_retry_delay() -> None:
    crowd = Crowd(Gate("uploads", at_once=1, waiting=1, patience=LATER))
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(crowd.enter())
        await eventually(lambda: crowd.inside == 1)
        with pytest.raises(ResourceExhausted, match=r"1 uploads .* and 1 are waiting") as caught:
            await crowd.enter()
        crowd.go.set()
    assert caught.value.reason == "TOO_MANY_CALLS"
    assert caught.value.retry_after > timedelta(0)


async def test_a_wait_times_out_and_leaves_no_trace() -> None:
    gate = Gate("calls", at_once=1, waiting=1, patience=SOON)
    crowd = Crowd(gate)
    async with asyncio.TaskGroup() as group:
        group.create_task(crowd.enter())
        await eventually(lambda: crowd.inside == 1)
        for _ in range(3):  # the queue is empty again
            with pytest.raises(ResourceExhausted, match=r"none ended within 0\.02 s"):
                await crowd.enter()
        crowd.go.set()
    await crowd.enter()


async def test_a_cancelled_wait_takes_no_place() -> None:
    gate = Gate("calls", at_once=1, waiting=5, patience=LATER)
    crowd = Crowd(gate)
    inside = asyncio.create_task(crowd.enter())
    await eventually(lambda: crowd.inside == 1)
    waiting = [asyncio.create_task(crowd.enter()) for _ in range(5)]
    await asyncio.sleep(0)
    for task in (*waiting, inside):
        task.cancel()
    await asyncio.gather(*waiting, inside, return_exceptions=True)
    crowd.go.set()
    async with asyncio.timeout(PATIENCE):
        await crowd.enter()
