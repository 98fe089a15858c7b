from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta

import pytest
from structlog.testing import capture_logs

from outbox_server.shared.loops import Loop, raise_if_cancelled, run_until_stopped
from tests.eventually import PATIENCE, eventually

NOW = timedelta(0)
LONG = timedelta(hours=1)


class Steps:
    """A step that returns the test's results in order, and then None."""

    def __init__(self, *results: timedelta | Exception | None) -> None:
        self._results = list(results)
        self._count = 0
        self._done = asyncio.Condition()

    async def step(self) -> timedelta | None:
        result = self._results.pop(0) if self._results else None
        async with self._done:
            self._count += 1
            self._done.notify_all()
        if isinstance(result, Exception):
            raise result
        return result

    async def reached(self, count: int) -> None:
        """Wait until the step has been called `count` times."""
        async with asyncio.timeout(PATIENCE), self._done:
            await self._done.wait_for(lambda: self._count >= count)

    @property
    def count(self) -> int:
        return self._count


@asynccontextmanager
async def running(loop: Loop) -> AsyncIterator[asyncio.Event]:
    """Run a loop until the context ends, or until the test sets the event that is given to it."""
    stop = asyncio.Event()
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(loop.run(stop))
        yield stop
        stop.set()


async def test_a_step_is_repeated_after_its_pause() -> None:
    steps = Steps(NOW, timedelta(milliseconds=1), NOW)
    async with running(Loop("test", steps.step)):
        await steps.reached(4)


async def test_a_pause_of_none_lasts_until_the_loop_is_woken() -> None:
    steps = Steps(None)
    loop = Loop("test", steps.step)
    async with running(loop):
        await steps.reached(1)
        loop.wake()
        await steps.reached(2)


async def test_a_wake_ends_a_pause() -> None:
    steps = Steps(LONG, LONG)
    loop = Loop("test", steps.step)
    async with running(loop):
        await steps.reached(1)
        loop.wake()
        await steps.reached(2)


async def test_a_wake_during_a_step_skips_the_pause_after_it() -> None:
    calls = 0

    async def step() -> timedelta:
        nonlocal calls
        calls += 1
        if calls == 1:
            loop.wake()
        return LONG

    loop = Loop("test", step)
    async with running(loop):
        await eventually(lambda: calls == 2)


async def test_a_wake_triggers_only_one_step() -> None:
    steps = Steps()
    loop = Loop("test", steps.step)
    async with running(loop):
        await steps.reached(1)
        loop.wake()
        loop.wake()
        await steps.reached(2)
    assert steps.count == 2


async def test_a_stop_ends_a_pause() -> None:
    steps = Steps(LONG)
    async with running(Loop("test", steps.step)) as stop:
        await steps.reached(1)
        stop.set()
    assert steps.count == 1


async def test_a_stop_lets_the_running_step_finish() -> None:
    begun, release = asyncio.Event(), asyncio.Event()
    finished: list[bool] = []

    async def step() -> timedelta:
        begun.set()
        await release.wait()
        finished.append(loop.stopping)
        return NOW

    loop = Loop("test", step)
    async with running(loop) as stop:
        await begun.wait()
        stop.set()
        release.set()
    assert finished == [True]


async def test_a_loop_that_is_stopped_before_it_runs_takes_no_step() -> None:
    steps, stop = Steps(), asyncio.Event()
    stop.set()
    await Loop("test", steps.step).run(stop)
    assert steps.count == 0


async def test_a_loop_without_a_stop_runs_until_it_is_cancelled() -> None:
    steps = Steps(NOW, NOW, None)
    task = asyncio.create_task(Loop("test", steps.step).run())
    await steps.reached(3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_expected_error_is_retried_after_a_pause() -> None:
    steps = Steps(OSError(), ConnectionError(), None)
    async with running(Loop("test", steps.step, errors=(OSError,), retry=NOW)):
        await steps.reached(3)


async def test_an_unexpected_error_ends_the_loop() -> None:
    steps = Steps(ValueError("a fault"))
    with pytest.raises(ValueError, match="a fault"):
        await Loop("test", steps.step, errors=(OSError,)).run()


async def test_a_loop_that_ended_leaves_no_task() -> None:
    with pytest.raises(ValueError, match="a fault"):
        await Loop("test", Steps(ValueError("a fault")).step).run()
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def test_the_pause_doubles_with_each_failure_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float | None] = []
    timeout = asyncio.timeout

    def at_once(pause: float | None) -> asyncio.Timeout:
        pauses.append(pause)
        return timeout(pause and 0)

    error, second = OSError(), timedelta(seconds=1)
    steps = Steps(error, error, error, error, NOW, error, None)
    loop = Loop("test", steps.step, errors=(OSError,), retry=second, longest_retry=5 * second)
    async with running(loop):
        monkeypatch.setattr("outbox_server.shared.loops.asyncio.timeout", at_once)
        await eventually(lambda: len(pauses) == 7)
        monkeypatch.undo()
    assert pauses == [1, 2, 4, 5, 0, 1, None]


async def test_the_first_failure_in_a_row_is_logged_and_so_is_its_end() -> None:
    steps = Steps(OSError(), OSError(), NOW, ConnectionError(), None)
    with capture_logs() as logs:
        async with running(Loop("reading", steps.step, errors=(OSError,), retry=NOW)):
            await steps.reached(5)
    assert [(log["event"], log.get("error"), log.get("failures")) for log in logs] == [
        ("reading failed", "OSError", None),
        ("reading works again", None, 2),
        ("reading failed", "ConnectionError", None),
        ("reading works again", None, 1),
    ]


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("expected", [False, True])
async def test_the_stack_trace_of_an_unexpected_error_is_logged_on_request(
    *, trace: bool, expected: bool
) -> None:
    error = ConnectionError() if expected else OSError()
    loop = Loop(
        "reading",
        Steps(error).step,
        errors=(OSError,),
        retry=NOW,
        trace=trace,
        expected=(ConnectionError,),
    )
    with capture_logs() as logs:
        async with running(loop):
            await eventually(lambda: len(logs) == 2)
    assert logs[0].get("exc_info") == (error if trace and not expected else None)


async def test_a_loop_whose_step_swallowed_its_cancellation_ends() -> None:
    begun = asyncio.Event()

    async def step() -> timedelta:
        begun.set()
        with suppress(asyncio.CancelledError):  # as `wait_for` does on Python 3.11
            await asyncio.Event().wait()
        return LONG

    task = asyncio.create_task(Loop("test", step).run())
    await begun.wait()
    task.cancel()
    # Awaited without a time limit, which would cancel it again.
    await asyncio.wait({task}, timeout=PATIENCE)
    assert task.cancelled()


async def test_a_loop_that_lost_its_cancellation_still_ends() -> None:
    async def loop_for_ever() -> None:
        while True:
            raise_if_cancelled()
            with suppress(asyncio.CancelledError):  # as `wait_for` does at times
                await asyncio.sleep(0)

    task = asyncio.create_task(loop_for_ever())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=PATIENCE)
    assert task.cancelled()


async def test_work_that_never_ends_is_cancelled_at_the_stop() -> None:
    stop, begun, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(run_until_stopped(work, stop))
        await begun.wait()
        stop.set()
    assert ended.is_set()


async def test_an_error_of_work_that_never_ends_is_raised_before_the_stop() -> None:
    async def work() -> None:
        raise ValueError("a fault")

    async with asyncio.timeout(PATIENCE):
        with pytest.raises(ExceptionGroup) as group:
            await run_until_stopped(work, asyncio.Event())
    assert group.group_contains(ValueError, match="a fault")
