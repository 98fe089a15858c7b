from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from datetime import timedelta

from outbox_server.shared.rpc.health import follow_dependencies
from tests.eventually import PATIENCE

SHORT = timedelta(milliseconds=20)


class Recorder:
    """Records the reported health, and lets a test wait for it."""

    def __init__(self) -> None:
        self.reported: asyncio.Queue[bool] = asyncio.Queue()
        self.reason = ""

    def set_serving(self, serving: bool, reason: str = "") -> None:
        self.reason = reason
        self.reported.put_nowait(serving)

    async def until(self, serving: bool) -> None:
        async with asyncio.timeout(PATIENCE):
            while await self.reported.get() is not serving:
                pass


async def test_health_follows_the_state_of_a_dependency() -> None:
    recorder, stop = Recorder(), asyncio.Event()
    broken = asyncio.Event()

    async def check() -> None:
        if broken.is_set():
            raise ConnectionError

    async with asyncio.TaskGroup() as group:
        group.create_task(follow_dependencies(recorder, {"x": check}, stop, interval=SHORT))
        await recorder.until(serving=True)
        broken.set()
        await recorder.until(serving=False)
        broken.clear()
        await recorder.until(serving=True)
        stop.set()


async def test_a_dependency_that_hangs_is_unhealthy() -> None:
    recorder, stop = Recorder(), asyncio.Event()

    async def hang() -> None:
        await asyncio.Event().wait()

    async def well() -> None:
        """Answer at once."""

    async with asyncio.TaskGroup() as group:
        group.create_task(
            follow_dependencies(recorder, {"x": hang, "y": well}, stop, interval=SHORT, limit=SHORT)
        )
        await recorder.until(serving=False)
        stop.set()


async def test_the_time_in_which_the_event_loop_is_busy_does_not_count() -> None:
    """As with a crowd of callers: every step of a check comes late, and the store is well."""
    recorder, stop = Recorder(), asyncio.Event()
    loop = asyncio.get_running_loop()

    async def take_many_steps() -> None:
        for _ in range(40):
            await asyncio.sleep(0)

    def keep_busy() -> None:
        # In each turn of the loop. Five of them take as long as a check may take.
        time.sleep(SHORT.total_seconds() / 5)
        if not stop.is_set():
            loop.call_soon(keep_busy)

    async with asyncio.TaskGroup() as group:
        loop.call_soon(keep_busy)
        group.create_task(
            follow_dependencies(recorder, {"x": take_many_steps}, stop, interval=SHORT, limit=SHORT)
        )
        try:
            async with asyncio.timeout(PATIENCE):
                assert [await recorder.reported.get() for _ in range(3)] == [True] * 3
        finally:
            stop.set()


async def test_a_dependency_check_that_ignores_cancellation_is_unhealthy() -> None:
    """psycopg ignores it while PostgreSQL is frozen. Health returns when the dependency answers."""
    recorder, stop = Recorder(), asyncio.Event()
    thawed = asyncio.Event()
    asked = 0

    async def freeze() -> None:
        nonlocal asked
        asked += 1
        while not thawed.is_set():
            with suppress(asyncio.CancelledError):
                await thawed.wait()

    async with asyncio.TaskGroup() as group:
        group.create_task(
            follow_dependencies(recorder, {"x": freeze}, stop, interval=SHORT, limit=SHORT)
        )
        for _ in range(3):
            await recorder.until(serving=False)
        assert asked == 1, "asked again while the first question hangs"
        thawed.set()
        await recorder.until(serving=True)
        stop.set()


async def test_an_optional_dependency_is_reported_and_health_does_not_depend_on_it() -> None:
    recorder, stop = Recorder(), asyncio.Event()
    found: asyncio.Queue[dict[str, bool]] = asyncio.Queue()

    async def fail() -> None:
        raise ConnectionError

    async def well() -> None:
        """Answer at once."""

    async with asyncio.TaskGroup() as group:
        group.create_task(
            follow_dependencies(
                recorder,
                {"x": fail, "y": well},
                stop,
                optional=("x",),
                report=lambda up: found.put_nowait(dict(up)),
                interval=SHORT,
            )
        )
        async with asyncio.timeout(PATIENCE):
            assert await found.get() == {"x": False, "y": True}
            assert await recorder.reported.get() is True
        stop.set()
