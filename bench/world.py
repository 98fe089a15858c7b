"""The stack under measurement: embedded stores, real service processes, a sink for mail."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from outbox_server.deploy.embedded.stack import Servers
from outbox_server.deploy.ports import free_port
from outbox_server.shared.database.migrating import migrate

# Debian's postfix has it; it is not in the PATH of every user.
_SINK: Final = "/usr/sbin/smtp-sink"
# Generous: a machine with other work starts slowly.
_READY_S: Final = 120
_STOP_S: Final = 60


class BenchStack:
    """Starts and stops the processes of a benchmark; all of them listen only on loopback."""

    def __init__(self, servers: Servers, smtp_port: int, database_url: str | None = None) -> None:
        self.servers = servers
        self.smtp_port = smtp_port
        self.database_url = database_url or servers.database_url
        self.smtp_url = f"smtp://127.0.0.1:{smtp_port}"
        self.scheduler = f"127.0.0.1:{free_port()}"
        self.stats = f"127.0.0.1:{free_port()}"
        self._environment = {
            **os.environ,
            "OUTBOX_DATABASE_URL": self.database_url,
            "OUTBOX_REDIS_URL": servers.redis_url,
            "OUTBOX_SMTP_URL": self.smtp_url,
            "OUTBOX_AUTH": "off",
            "OUTBOX_MIN_GAP": "0",
            "OUTBOX_LOG_LEVEL": "warning",
        }

    def with_new_ports(self) -> BenchStack:
        """Return a stack of other processes with the same servers."""
        return BenchStack(self.servers, self.smtp_port, self.database_url)

    @property
    def stores(self) -> dict[str, int]:
        """The processes of PostgreSQL and Redis."""
        return {
            "postgresql": self.servers.postgres.child.pid,
            "redis": self.servers.valkey.child.pid,
        }

    def environment(self, **settings: str) -> dict[str, str]:
        """Return the environment of a process with these settings."""
        named = {f"OUTBOX_{name.upper()}": value for name, value in settings.items()}
        return {**self._environment, **named}

    @contextmanager
    def process(self, service: str, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run one service until the context ends."""
        listen = {"scheduler": self.scheduler, "stats": self.stats}.get(service)
        listen = listen or f"127.0.0.1:{free_port()}"
        environment = self.environment(**{f"{service}_listen": listen, **settings})
        child = subprocess.Popen(
            [sys.executable, "-m", f"outbox_server.services.{service}"], env=environment
        )
        with _ended(child):
            wait_until_serving(listen, child)
            yield child


@contextmanager
def _ended(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a child when the context ends, by force if it does not end by itself."""
    try:
        yield
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_until_serving(listen: str, child: subprocess.Popen[bytes]) -> None:
    """Return when a server says SERVING.

    Raises:
        SystemExit: its process ended.
    """
    with grpc.insecure_channel(listen) as channel:
        ready = grpc.channel_ready_future(channel)
        for _ in range(_READY_S):
            with suppress(grpc.FutureTimeoutError):
                ready.result(1)
                break
            if child.poll() is not None:
                raise SystemExit(f"a service ended with {child.returncode}")
        else:
            raise SystemExit(f"a service did not answer within {_READY_S} s")
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=_READY_S
        )
        for answer in watch:
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                watch.cancel()
                return
            if child.poll() is not None:
                raise SystemExit(f"a service ended with {child.returncode}")


@contextmanager
def program(*argv: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a program of bench/ that prints its port; yield it with the port."""
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    with _ended(child):
        if child.stdout is None:
            raise RuntimeError("no output")
        with child.stdout:
            line = child.stdout.readline()
            if not line.strip().isdigit():
                raise SystemExit(f"{' '.join(argv)} printed no port")
            yield child, int(line)


@contextmanager
def background(argv: Sequence[str], env: dict[str, str], cwd: Path) -> Iterator[int]:
    """Run a program until the context ends; yield its process id."""
    child = subprocess.Popen(argv, env={**os.environ, **env}, cwd=cwd)
    with _ended(child):
        yield child.pid


def sink_name() -> str:
    """Return which program receives the mail."""
    return "smtp-sink of Postfix" if shutil.which(_SINK) else "bench.sink (smtp-sink is missing)"


@contextmanager
def smtp_sink() -> Iterator[tuple[int, int]]:
    """Run a server that accepts every mail and stores none; yield its process id and its port."""
    if not shutil.which(_SINK):
        with program(sys.executable, "-m", "bench.sink") as (child, port):
            yield child.pid, port
        return
    port = free_port()
    command = [_SINK, *(["-u", "nobody"] if os.getuid() == 0 else []), f"127.0.0.1:{port}", "1000"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with _ended(child):
        yield child.pid, port


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[BenchStack]:
    """Yield a migrated stack in `folder`, with durable stores."""
    with smtp_sink() as (_, smtp_port):
        async with Servers(folder, inbox=False) as servers:
            await asyncio.to_thread(migrate, servers.database_url)
            yield BenchStack(servers, smtp_port)


def peak_memory_mib(process: subprocess.Popen[bytes]) -> float:
    """Return the peak resident memory of a process."""
    for line in Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM")
