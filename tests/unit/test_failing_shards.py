"""A shard whose server fails gets one slot at most: a claim of nothing is no answer of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from outbox_server.services.dispatcher.dispatcher import Dispatcher
from outbox_server.services.dispatcher.slots import Slots
from outbox_server.services.dispatcher.wake import WakeListener
from tests.eventually import eventually


class FailingQueue:
    """A queue whose server answers no claim."""

    shard = 3

    def __init__(self) -> None:
        self.wants: list[int] = []

    async def claim(self, want: int, limits: Sequence[Any]) -> Any:
        del limits
        self.wants.append(want)
        raise OSError("it hangs")


async def test_a_failing_shard_gets_one_slot_at_most() -> None:
    slots, queue = Slots(10, unproven=10), FailingQueue()
    # All are busy with mail of another shard.
    await slots.take_free()
    listener = WakeListener(None, "x")  # type: ignore[arg-type]
    # Only what the loop of one shard uses.
    parts: Any = SimpleNamespace(
        _slots=slots,
        _failing=set(),
        _store_failed=False,
        _loader=SimpleNamespace(
            lives=SimpleNamespace(is_superseded=lambda _: False), learn_routes=lambda *_: None
        ),
        _load_heads=lambda *_: None,
        _metrics=SimpleNamespace(claimed=lambda _: None),
        _groups=SimpleNamespace(start=lambda *given: slots.release(given[-1])),
    )
    parts._claim = lambda *given: Dispatcher._claim(parts, *given)
    parts._pause_after = lambda *given: Dispatcher._pause_after(parts, *given)
    loop = asyncio.create_task(Dispatcher._dispatch(parts, queue, listener))  # type: ignore[arg-type]

    async def a_send_ends() -> None:
        # The next mail has its slot at once, so none is free, but claims may be made ahead.
        slots.hand_over(3)
        slots.release(0)
        listener.wake()
        await asyncio.sleep(0)

    async def has_claimed() -> bool:
        await a_send_ends()
        return bool(queue.wants)

    await eventually(has_claimed)
    for _ in range(100):
        await a_send_ends()
    assert len(queue.wants) == 1
    slots.release(4)
    await eventually(lambda: len(queue.wants) == 2)
    assert queue.wants[1] == 1
    slots.close()
    listener.wake()
    await loop
