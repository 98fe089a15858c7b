"""`run_service` in separate processes that real signals end."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from outbox_server.shared.process import serve_until_stopped
from tests.eventually import PATIENCE

PROLOGUE = """
import asyncio, sys, time
from datetime import timedelta
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.rpc.server import GrpcServer
from outbox_server.shared.logs import configure_logging
from outbox_server.shared.process import run_service, serve_until_stopped
from outbox_server.shared.settings import load_settings

configure_logging(load_settings())
"""
EPILOGUE = "\nsys.exit(run_service(main))\n"


@asynccontextmanager
async def process(main: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program around `main`; kill it at the end if it still runs."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROLOGUE + main + EPILOGUE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PATIENCE):
            yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def line(child: asyncio.subprocess.Process) -> str:
    assert child.stdout is not None
    return (await child.stdout.readline()).decode().strip()


async def errors(child: asyncio.subprocess.Process) -> str:
    assert child.stderr is not None
    return (await child.stderr.read()).decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_serving_process_exits_with_code_0_on_a_signal(number: signal.Signals) -> None:
    main = """
async def main(stop):
    settings = load_settings(auth="off")
    server = GrpcServer(settings, "127.0.0.1:0", [])
    async def work():
        print(type(asyncio.get_running_loop()).__module__, server.port, flush=True)
        await stop.wait()
        print("worked", server.serving, flush=True)
    await serve_until_stopped(server, stop, timedelta(seconds=5), [work])
    print("stopped", flush=True)
"""
    async with process(main) as child:
        assert (await line(child)).startswith("uvloop")
        child.send_signal(number)
        assert await line(child) == "worked False"
        assert await line(child) == "stopped"
        assert await child.wait() == 0


# Any signal stops any way to hang: the kernel handles it.
@pytest.mark.parametrize(
    ("hang", "number"),
    [("await asyncio.Event().wait()", signal.SIGTERM), ("time.sleep(60)", signal.SIGINT)],
)
async def test_a_second_signal_ends_a_process_that_does_not_stop(
    hang: str, number: signal.Signals
) -> None:
    main = f"""
async def main(stop):
    print("ready", flush=True)
    await stop.wait()
    print("stopping", flush=True)
    {hang}
"""
    async with process(main) as child:
        assert await line(child) == "ready"
        child.send_signal(number)
        assert await line(child) == "stopping"
        child.send_signal(number)
        assert await child.wait() == -number


async def test_an_invalid_setting_prints_one_line_and_exits_with_code_2() -> None:
    main = """
async def main(stop):
    async with asyncio.TaskGroup() as group:
        group.create_task(start())

async def start():
    raise ConfigurationError("OUTBOX_X: wrong\\nand again")
"""
    async with process(main) as child:
        assert await errors(child) == "OUTBOX_X: wrong and again\n"
        assert await child.wait() == 2


async def test_an_unknown_error_is_logged_with_its_trace_and_exits_with_code_1() -> None:
    main = """
async def main(stop):
    raise ValueError("boom")
"""
    async with process(main) as child:
        logged = await errors(child)
        assert "ValueError: boom" in logged
        assert "Traceback" in logged
        assert await child.wait() == 1


async def test_failures_before_logging_is_set_up_are_printed_on_stderr() -> None:
    main = """
import structlog
structlog.reset_defaults()

async def main(stop):
    raise ValueError("boom")
"""
    async with process(main) as child:
        assert "ValueError: boom" in await errors(child)
        assert await line(child) == ""


class Server:
    """Records the states that it is given."""

    def __init__(self) -> None:
        self.reported: list[str] = []

    async def start(self) -> None:
        self.reported.append("start")

    def begin_drain(self) -> None:
        self.reported.append("drain")

    async def drain_and_stop(self, grace: timedelta) -> None:
        self.reported.append("stop now" if not grace else "stop")


async def test_the_server_drains_first_and_stops_after_the_work() -> None:
    server, stop = Server(), asyncio.Event()

    async def work() -> None:
        server.reported.append("work")
        await stop.wait()
        server.reported.append("worked")

    async with asyncio.TaskGroup() as group:
        group.create_task(serve_until_stopped(server, stop, timedelta(seconds=5), [work]))
        stop.set()
    assert server.reported[0] == "start"
    assert server.reported[-1] == "stop"
    assert server.reported.index("drain") < server.reported.index("stop")
    assert server.reported.index("worked") < server.reported.index("stop")


async def test_work_that_does_not_end_is_cancelled_after_the_grace_period() -> None:
    server, stop = Server(), asyncio.Event()
    cancelled = asyncio.Event()

    async def work() -> None:
        stop.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    await serve_until_stopped(server, stop, timedelta(milliseconds=50), [work])
    assert cancelled.is_set()
    assert server.reported == ["start", "drain", "stop now"]


async def test_failing_work_stops_the_server_and_all_other_work() -> None:
    server, stop = Server(), asyncio.Event()
    cancelled = asyncio.Event()

    async def fail() -> None:
        raise ValueError("boom")

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(ExceptionGroup) as caught:
        await serve_until_stopped(server, stop, timedelta(seconds=5), [work, fail])
    assert [str(error) for error in caught.value.exceptions] == ["boom"]
    assert cancelled.is_set()
    assert server.reported == ["start", "stop now"]


async def test_the_imported_modules_are_left_out_of_garbage_collections() -> None:
    """A full collection that examined them would stop the event loop for 0.1 s."""
    main = """
import gc
async def main(stop):
    print(len(gc.get_objects()), gc.get_freeze_count(), flush=True)
"""
    async with process(main) as child:
        examined, left_out = map(int, (await line(child)).split())
        assert await child.wait() == 0
    assert examined < left_out / 10
