"""The stack under measurement: embedded stores, real service processes, Postfix's smtp-sink."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from outbox_server.deploy.embedded.stack import Servers
from outbox_server.deploy.ports import free_port
from outbox_server.shared.database.migrating import migrate

if TYPE_CHECKING:
    from collections.abc import Iterator

_SINK = "/usr/sbin/smtp-sink"
_READY_S = 30


class BenchStack:
    """Starts and stops the processes of a benchmark; all of them listen only on loopback."""

    def __init__(self, servers: Servers, smtp_port: int) -> None:
        self.servers = servers
        self._smtp_port = smtp_port
        self.smtp_url = f"smtp://127.0.0.1:{smtp_port}"
        self.scheduler = f"127.0.0.1:{free_port()}"
        self._environment = {
            **os.environ,
            "OUTBOX_DATABASE_URL": servers.database_url,
            "OUTBOX_REDIS_URL": servers.redis_url,
            "OUTBOX_SMTP_URL": self.smtp_url,
            "OUTBOX_AUTH": "off",
            "OUTBOX_MIN_GAP": "0",
            "OUTBOX_LOG_LEVEL": "warning",
            "OUTBOX_SCHEDULER_LISTEN": self.scheduler,
        }

    def with_new_ports(self) -> BenchStack:
        """Return a stack of other processes with the same servers."""
        return BenchStack(self.servers, self._smtp_port)

    @contextmanager
    def process(self, service: str, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run one service until the context ends."""
        listen = f"127.0.0.1:{free_port()}"
        if service == "scheduler":
            listen = self.scheduler
        environment = {
            **self._environment,
            f"OUTBOX_{service.upper()}_LISTEN": listen,
            **{f"OUTBOX_{name.upper()}": value for name, value in settings.items()},
        }
        child = subprocess.Popen(
            [sys.executable, "-m", f"outbox_server.services.{service}"], env=environment
        )
        try:
            _wait_until_serving(listen, child)
            yield child
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(_READY_S)


def _wait_until_serving(listen: str, child: subprocess.Popen[bytes]) -> None:
    with grpc.insecure_channel(listen) as channel:
        grpc.channel_ready_future(channel).result(_READY_S)
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
def smtp_sink() -> Iterator[int]:
    """Run Postfix's smtp-sink, which accepts every mail and stores none; yield its port."""
    if not shutil.which(_SINK):
        raise SystemExit("the benchmark needs smtp-sink: apt-get install postfix")
    port = free_port()
    command = [_SINK, *(["-u", "nobody"] if os.getuid() == 0 else []), f"127.0.0.1:{port}", "500"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        child.terminate()
        child.wait()


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[BenchStack]:
    """Yield a migrated stack in `folder`, with durable stores."""
    with smtp_sink() as smtp_port:
        async with Servers(folder, inbox=False) as servers:
            await asyncio.to_thread(migrate, servers.database_url)
            yield BenchStack(servers, smtp_port)


def peak_memory_mib(process: subprocess.Popen[bytes]) -> float:
    """Return the peak resident memory of a process."""
    for line in Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM")
