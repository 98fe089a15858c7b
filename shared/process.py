"""Runs a process: its event loop, its signals, its exit code, and the order of its shutdown."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Final, Protocol

import structlog
import uvloop

from outbox_server.shared.errors import ConfigurationError, leaves
from outbox_server.shared.garbage import ShortCollections
from outbox_server.shared.logs import configure_logging
from outbox_server.shared.loops import as_coroutine
from outbox_server.shared.settings import Settings, load_settings
from outbox_server.shared.unknown_settings import unknown_settings

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2

# How long the event loop waits at most for a thread that computes, such as one that reads a CSV, in
# seconds. By default it is 5 ms, at each of the waits of each call.
SWITCH_S: Final = 0.0005

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def run_service(main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run `main` to its end in a uvloop and return the exit code of the process.

    SIGTERM and SIGINT set the event that is passed to `main`; a second signal ends the process at
    once. The code is 0 if `main` returned, 2 after a ConfigurationError (one line on stderr), 1
    after any other error, which is logged.
    """
    if not structlog.is_configured():
        # By default structlog writes to stdout, and traces contain the locals of every frame.
        configure_logging(Settings.model_construct())
    ShortCollections().start()
    # `services.starting` turns collections off while it imports modules.
    gc.enable()
    sys.setswitchinterval(SWITCH_S)
    code = EXIT_OK
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_until_done(main))
    except* ConfigurationError as group:
        code = EXIT_USAGE
        for error in leaves(group):
            sys.stderr.write(" ".join(str(error).split()) + "\n")
    except* Exception as group:  # noqa: BLE001 - logged, and the process ends
        code = EXIT_FAILED
        structlog.get_logger("outbox.process").error("the process failed", exc_info=group)
    return code


def run_with_settings(serve: Callable[[Settings, asyncio.Event], Awaitable[None]]) -> int:
    """Run a service with its settings from OUTBOX_*, as `run_service` does."""

    async def main(stop: asyncio.Event) -> None:
        settings = load_settings()
        configure_logging(settings)
        for warning in unknown_settings(os.environ):
            structlog.get_logger("outbox.settings").warning("unknown_setting", warning=warning)
        await serve(settings, stop)

    return run_service(main)


class Drainable(Protocol):
    """The methods of a server that `serve_until_stopped` uses, such as GrpcServer's."""

    async def start(self) -> None:
        """Bind the port and accept calls."""

    def begin_drain(self) -> None:
        """Report NOT_SERVING from now on, but still accept calls."""

    async def drain_and_stop(self, grace: timedelta) -> None:
        """Let calls in progress finish, for at most `grace`, and stop."""


async def serve_until_stopped(
    server: Drainable,
    stop: asyncio.Event,
    grace: timedelta,
    work: Sequence[Callable[[], Awaitable[None]]] = (),
) -> None:
    """Run the server and `work` until `stop` is set; then drain within `grace`.

    Each part of `work` must end by itself once `stop` is set, and is cancelled after `grace`. The
    server accepts calls until the work has ended, with health at NOT_SERVING.

    Raises:
        ExceptionGroup: a part of `work` failed; the others were cancelled, the server stopped.
    """
    loop = asyncio.get_running_loop()
    await server.start()
    left = timedelta(0)  # after a failure there is nothing to wait for
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(as_coroutine(part)) for part in work]
            await stop.wait()
            end = loop.time() + grace.total_seconds()
            server.begin_drain()
            if tasks:
                _, late = await asyncio.wait(tasks, timeout=grace.total_seconds())
                for task in late:
                    task.cancel()
        left = max(timedelta(seconds=end - loop.time()), timedelta(0))
    finally:
        await server.drain_and_stop(left)


async def _until_done(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        # The kernel handles a second signal: it ends the process even if the loop hangs, and the
        # parent process sees the signal.
        for handled in _SIGNALS:
            loop.remove_signal_handler(handled)
            signal.signal(handled, signal.SIG_DFL)
        structlog.get_logger("outbox.process").info("stopping", signal=number.name)
        stop.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        await main(stop)
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
