"""Dispatchers for tests: in this process, or as processes that can be killed and stopped."""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from outbox.v1 import dispatcher_pb2, dispatcher_service_pb2, dispatcher_service_pb2_grpc

from outbox_server.services.dispatcher.server import serve
from outbox_server.shared.process import run_with_settings
from outbox_server.shared.rpc.probes import REASON_KEY
from outbox_server.shared.settings import Settings, load_settings
from tests.eventually import eventually
from tests.probing import serving

SERVICE = "outbox.v1.DispatcherService"
_ROOT = Path(__file__).parent.parent
# Processes are forked from a server that has imported every module of the services. A fork takes
# 0.1 s; a new Python takes a second of CPU. The server also imports the main module, or each fork
# would import pytest's.
FORKS: Final = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "__main__",
        __name__,
        "outbox_server.services.scheduler.server",
        "outbox_server.services.stats.server",
    ]
)


def options(
    database_url: str, redis_url: str, smtp_url: str, **changes: str | int
) -> dict[str, str]:
    """Return settings as text, by name: short times, and senders without limits."""
    defaults = {
        "database_url": database_url,
        "redis_url": redis_url,
        "smtp_url": smtp_url,
        "auth": "off",
        "smtp_allow": "127.0.0.1",
        "smtp_ports": "any",
        "dispatcher_listen": "127.0.0.1:0",
        "dispatcher_concurrency": "5",
        "min_gap": "0",
        "retry_backoff": "100ms,200ms",
        "lease": "10s",
        # Tests with a server that stays silent set a shorter limit.
        "smtp_timeout": "60s",
        "shutdown_grace": "5s",
        "log_level": "warning",
    }
    return defaults | {name: str(value) for name, value in changes.items()}


def settings_of(values: Mapping[str, str]) -> Settings:
    """Return the settings that a process would have."""
    return load_settings(**values)


class DispatcherClient:
    """A client of one dispatcher."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.stub = dispatcher_service_pb2_grpc.DispatcherServiceStub(channel)

    async def status(self) -> dispatcher_pb2.DispatcherStatus:
        return await self.stub.GetDispatcherStatus(
            dispatcher_service_pb2.GetDispatcherStatusRequest()
        )

    async def drain(
        self, within: float = 30.0, **said: str
    ) -> dispatcher_service_pb2.DrainDispatcherResponse:
        request = dispatcher_service_pb2.DrainDispatcherRequest(**said)
        return await self.stub.DrainDispatcher(request, timeout=within)

    async def serving(self) -> bool:
        """Return whether its health is SERVING."""
        return await serving(self.channel, SERVICE)


class RunningDispatcher(DispatcherClient):
    """A dispatcher in this process."""

    def __init__(self, channel: grpc.aio.Channel, stop: asyncio.Event, address: str) -> None:
        super().__init__(channel)
        self.stopping = stop
        self.address = address


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[RunningDispatcher]:
    """Run a dispatcher in this process; the context stops it at its end."""
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(settings, stop, ready=port.set_result))
        address = f"127.0.0.1:{await port}"
        async with grpc.aio.insecure_channel(address) as channel:
            try:
                yield RunningDispatcher(channel, stop, address)
            finally:
                stop.set()


class DispatcherProcess:
    """A dispatcher process. It is killed at the end of its block if it still runs.

    It is forked with every module imported. With `execute` a new Python starts, which costs a
    second of CPU more but loads a library of LD_PRELOAD.
    `service` is another service to run in the same way. `lock_timeout` is how long the statements
    of a dispatcher wait for a lock, instead of a second.
    """

    def __init__(
        self,
        values: Mapping[str, str],
        log: Path,
        service: str = "dispatcher",
        *,
        execute: bool = False,
        lock_timeout: timedelta | None = None,
    ) -> None:
        # Empty until it listens. It chooses a free port itself: a port chosen here could be taken
        # meanwhile.
        self._address = ""
        self._log = log
        self._service = service
        self._lock_timeout = lock_timeout
        given = {f"{service}_listen": "127.0.0.1:0", **values}
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")},
            **{f"OUTBOX_{name.upper()}": value for name, value in given.items()},
        }
        self._forks = multiprocessing.get_context("spawn") if execute else FORKS
        self._process: BaseProcess | None = None
        self._ports: Connection | None = None

    @property
    def listen(self) -> str:
        """Return its address, or an empty string until it listens."""
        if not self._address and self._ports is not None and self._ports.poll():
            with suppress(EOFError):  # the process ended first
                self._address = f"127.0.0.1:{self._ports.recv()}"
        return self._address

    async def address(self) -> str:
        """Return its address, once it listens."""
        await eventually(lambda: self.listen or not self.is_running())
        assert self.listen, self.log()
        return self.listen

    @property
    def process(self) -> BaseProcess:
        assert self._process is not None
        return self._process

    async def start(self) -> None:
        """Start it; return before it is ready."""
        self._address = ""
        self._log.touch()
        self._ports, port = self._forks.Pipe(duplex=False)
        given = (self._service, self._environment, self._log, port, self._lock_timeout)
        self._process = self._forks.Process(target=_run_process, args=given, daemon=True)
        await asyncio.to_thread(self._process.start)
        port.close()

    async def kill(self) -> None:
        """End it with kill -9; return when it has ended."""
        self.process.kill()
        await self.exit_code()

    def pause(self) -> None:
        """Stop it with SIGSTOP, as a debugger or an overcommitted host does."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Resume it after a `pause`."""
        self.signal(signal.SIGCONT)

    async def terminate(self) -> int:
        """Send SIGTERM; return its exit code."""
        self.signal(signal.SIGTERM)
        return await self.exit_code()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def log(self) -> str:
        """Return its output."""
        return self._log.read_text()

    def is_running(self) -> bool:
        """Return whether it still runs."""
        return self.process.exitcode is None

    async def serving(self) -> bool:
        """Return whether its health is SERVING."""
        if not self.listen:
            return False
        async with grpc.aio.insecure_channel(self.listen) as channel:
            return await serving(channel, SERVICE)

    async def not_serving(self) -> bool:
        """Return whether its health is not SERVING or it does not answer."""
        return not await self.serving()

    async def ready(self) -> bool:
        """Return whether the server, of whichever service, is SERVING."""
        if not self.listen:
            return False
        async with grpc.aio.insecure_channel(self.listen) as channel:
            return await serving(channel)

    async def unready(self) -> bool:
        """Return the opposite of `ready`."""
        return not await self.ready()

    async def exit_code(self) -> int:
        """Wait until it ends by itself; return its exit code."""
        await eventually(lambda: not self.is_running())
        if self._ports is not None:
            self._ports.close()
            self._ports = None
        assert self.process.exitcode is not None
        return self.process.exitcode


def _run_process(
    service: str,
    environment: Mapping[str, str],
    log: Path,
    port: Connection,
    lock_timeout: timedelta | None,
) -> None:
    """Run a service as `python -m` does; send its port."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(_ROOT)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    module: Any = importlib.import_module(f"outbox_server.services.{service}.server")
    if lock_timeout is not None:
        module._LOCK_TIMEOUT = lock_timeout
    sys.exit(run_with_settings(partial(module.serve, ready=port.send)))


async def readiness(address: str) -> tuple[str, str]:
    """Return the state and the reason that a health port gives."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="readiness")
        )
        status = (await call).status
        said = dict(list(await call.trailing_metadata()))
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    return name, str(said.get(REASON_KEY, ""))


@asynccontextmanager
async def process(
    values: Mapping[str, str],
    log: Path,
    service: str = "dispatcher",
    *,
    execute: bool = False,
    lock_timeout: timedelta | None = None,
) -> AsyncIterator[DispatcherProcess]:
    """Run a dispatcher, or another service, in a separate process."""
    child = DispatcherProcess(values, log, service, execute=execute, lock_timeout=lock_timeout)
    await child.start()
    try:
        yield child
    except Exception as error:
        state = "running" if child.is_running() else f"ended with {child.process.exitcode}"
        error.add_note(f"The {service} was {state}. Its log:\n{child.log()}")
        raise
    finally:
        if child.is_running():
            await child.kill()
