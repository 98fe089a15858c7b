"""Runs a command that owns an embedded stack until it is done, or until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import uvloop

T = TypeVar("T")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(main: Callable[[], Coroutine[Any, Any, T]], on_stop: Callable[[], None]) -> T | None:
    """Run `main` to its end and return its result, or None if a signal cancelled it.

    The first signal calls `on_stop`. A second one ends the process at once, and everything that it
    started.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_until_signal(main, on_stop))


async def _until_signal(
    main: Callable[[], Coroutine[Any, Any, T]], on_stop: Callable[[], None]
) -> T | None:
    loop = asyncio.get_running_loop()
    task = loop.create_task(main())

    def stop() -> None:
        for handled in _SIGNALS:
            loop.remove_signal_handler(handled)
            signal.signal(handled, signal.SIG_DFL)
        on_stop()
        task.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        await asyncio.wait({task})
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
    return None if task.cancelled() else task.result()
