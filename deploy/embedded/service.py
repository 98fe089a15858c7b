"""Runs one of Outbox's own services as a child process of the embedded stack."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from outbox_server.deploy.child import Child
from outbox_server.deploy.ports import LOOPBACK, free_port
from outbox_server.shared.durations import format_duration
from outbox_server.shared.settings import Settings

# Importing a service takes Python a second, and several when the machine is busy.
_START_LIMIT_S: Final = 60.0
_CHECK_LIMIT_S: Final = 1.0
_BESIDE_GRACE_S: Final = 3.0
_CHANNEL: Final = (
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 50),
    # The minimum time limit of one attempt to connect: as long as a check may take.
    ("grpc.min_reconnect_backoff_ms", int(_CHECK_LIMIT_S * 1000)),
    # Do not reuse the connection to an earlier process with the same address.
    ("grpc.use_local_subchannel_pool", 1),
)
# Settings that name a file.
_FILES: Final = frozenset(("reply_rules", "smtp_ca", "tls_client_ca"))
_PLACE: Final = {"PATH": os.defpath, "LC_ALL": "C.UTF-8"}


def environment_of(settings: Settings) -> dict[str, str]:
    """Return the OUTBOX_* variables of the values that are set in `settings`, without defaults.

    The services run in another folder, so paths are made absolute.
    """
    return {
        f"OUTBOX_{name.upper()}": _as_text(_path(value) if name in _FILES and value else value)
        for name in settings.model_fields_set
        for value in [getattr(settings, name)]
    }


def _path(name: str) -> str:
    return str(Path(name).absolute())


class Service:
    """Runs `python -m outbox_server.services.NAME` with the given environment only."""

    def __init__(
        self,
        title: str,
        name: str,
        address: str,
        environment: Mapping[str, str],
        *,
        folder: Path,
        log: Path,
        grace: timedelta,
        metrics: bool = False,
        health: bool = False,
    ) -> None:
        """`title` is for people; `grace` is the time that the service may take to drain.

        With `metrics`, it serves its metrics at a free port. With `health`, it has a health port
        without TLS, at a free port too, which `serving` then asks.
        """
        self.title = title
        self.name = name
        self.address = address
        # Where it serves its metrics; empty if it does not.
        self.metrics = f"{LOOPBACK}:{free_port()}" if metrics else ""
        # Where it answers health checks without TLS; empty if only at its own port.
        self.health = f"{LOOPBACK}:{free_port()}" if health else ""
        self._variables = {**_PLACE, **environment}
        self._folder = folder
        self._log = log
        self._grace_s = grace.total_seconds()
        self.child = self._child_at(address)

    def move(self, address: str) -> None:
        """Use another address from the next start on. The service must not be running."""
        self.address = address
        if self.metrics:
            self.metrics = f"{LOOPBACK}:{free_port()}"
        if self.health:
            self.health = f"{LOOPBACK}:{free_port()}"
        self.child = self._child_at(address)

    def begin_with(self, more: Mapping[str, str]) -> None:
        """Add these variables from the next start on. They replace the ones of an earlier call."""
        self.child.environment = self._environment_at(self.address) | dict(more)

    def begin_log(self) -> None:
        """Rename the current log to `.log.1`, so that logs do not grow for ever."""
        if self._log.exists():
            self._log.replace(self._log.with_name(f"{self._log.name}.1"))

    async def start(self) -> None:
        """Start, and return when health reports SERVING.

        Raises:
            LocalServerError: it did not start; nothing is left running, the text quotes its log.
        """
        self.child.start()
        try:
            await self.child.until_ready(self.serving, _START_LIMIT_S)
        except BaseException:
            await self.child.stop()
            raise

    async def stop(self) -> None:
        """Drain and stop, within the grace period and a few seconds more."""
        await self.child.stop((signal.SIGTERM, self._grace_s + _BESIDE_GRACE_S))

    def _child_at(self, address: str) -> Child:
        return Child(
            self.title,
            [sys.executable, "-m", f"outbox_server.services.{self.name}"],
            environment=self._environment_at(address),
            log=self._log,
            cwd=self._folder,
        )

    def _environment_at(self, address: str) -> dict[str, str]:
        return {
            **self._variables,
            f"OUTBOX_{self.name.upper()}_LISTEN": address,
            "OUTBOX_METRICS_LISTEN": self.metrics,
            "OUTBOX_HEALTH_LISTEN": self.health,
        }

    async def serving(self) -> bool:
        """Return whether health reports SERVING."""
        # Not grpc.aio: its thread would be running inside grpc when a later child is forked.
        return await asyncio.to_thread(_serves, self.health or self.address)


def _serves(address: str) -> bool:
    with grpc.insecure_channel(address, options=_CHANNEL) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=_CHECK_LIMIT_S
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def describe_end(code: int) -> str:
    """Return how a process ended, for people; negative codes are signals."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with {code}"


def _as_text(value: Any) -> str:
    if isinstance(value, timedelta):
        milliseconds = value / timedelta(milliseconds=1)
        return format_duration(value) if milliseconds.is_integer() else f"{milliseconds:f}ms"
    if isinstance(value, tuple):
        return ",".join(_as_text(part) for part in value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value.get_secret_value() if hasattr(value, "get_secret_value") else value)
