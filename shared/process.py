"""The life of a process: its loop, its signals, its exit code, and the order in which it stops."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Final, Protocol

import structlog
import uvloop

from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.logs import configure_logging
from outbox_server.shared.settings import Settings, load_settings

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def run_service(main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run `main` to its end in a uvloop and return the exit code of the process.

    SIGTERM and SIGINT set the event that `main` is given; a second one ends the process at once.
    The code is 0 if `main` returned, 2 after a ConfigurationError (one line on stderr), 1 after
    any other error, which is logged.
    """
    if not structlog.is_configured():
        # Its own default is stdout, with the locals of every frame in a trace.
        configure_logging(Settings.model_construct())
    code = EXIT_OK
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_until_done(main))
    except* ConfigurationError as group:
        code = EXIT_USAGE
        for error in _leaves(group):
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
        await serve(settings, stop)

    return run_service(main)


class Drainable(Protocol):
    """What `serve_until_stopped` asks of a server; GrpcServer has it."""

    async def start(self) -> None:
        """Bind and answer."""

    def begin_drain(self) -> None:
        """Say NOT_SERVING for good, and go on answering."""

    async def drain_and_stop(self, grace: timedelta) -> None:
        """Finish what is under way, for at most `grace`."""


async def serve_until_stopped(
    server: Drainable,
    stop: asyncio.Event,
    grace: timedelta,
    work: Sequence[Callable[[], Awaitable[None]]] = (),
) -> None:
    """Serve, with `work` running beside it, until `stop` is set; then drain within `grace`.

    Each of `work` is expected to end by itself once `stop` is set; what has not after `grace` is
    cancelled. The server answers until the work has ended, with health at NOT_SERVING.

    Raises:
        ExceptionGroup: one of `work` failed; the rest was cancelled and the server stopped.
    """
    loop = asyncio.get_running_loop()
    await server.start()
    left = timedelta(0)  # a failure leaves nothing to be waited for
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_as_coroutine(part)) for part in work]
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
        # The second one is the kernel's: it ends the process even if the loop hangs, and the
        # parent sees by which signal.
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


async def _as_coroutine(part: Callable[[], Awaitable[None]]) -> None:
    await part()


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for member in error.exceptions for leaf in _leaves(member)]
    return [error]
