"""Replaces all processes of a stack, one after the other, as rolling updates of Kubernetes do."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from outbox_server.deploy.child import LocalServerError
from outbox_server.deploy.drill.waiting import until
from outbox_server.deploy.embedded.service import Service
from outbox_server.deploy.embedded.supervisor import LocalSystem

# How much longer the chart's terminationGracePeriodSeconds is than OUTBOX_SHUTDOWN_GRACE.
BESIDE_GRACE_S: Final = 15.0
# A new process is not ready while a store is away. Outages of 30 s may come in a row.
READY_LIMIT_S: Final = 180.0
_METRICS_LIMIT_S: Final = 15.0


@dataclass
class Rolled:
    """The rolling restarts of a drill."""

    replaced: int = 0
    # The longest time from SIGTERM to the end of a process.
    longest_end_s: float = 0.0
    # What went wrong, one per line.
    problems: list[str] = field(default_factory=list)


class RollingRestart:
    """Replaces each process: starts a new one, waits until it is ready, and ends the old one."""

    def __init__(self, system: LocalSystem, grace_s: float, say: Callable[[str], None]) -> None:
        self._system = system
        self._limit_s = grace_s + BESIDE_GRACE_S
        self._say = say
        # One rolling restart at a time: a second one would start twice as many processes.
        self._one = asyncio.Lock()
        self.rolled = Rolled()

    async def run(self) -> None:
        """Replace every process that runs now, one after the other."""
        async with self._one:
            for old in self._system.services:
                await self.replace(old)

    async def replace(self, old: Service) -> None:
        """Start a new process of the same service, and end `old` when the new one is ready."""
        began = time.monotonic()
        try:
            new = await self._system.add(old.name)
            await until(new.serving, READY_LIMIT_S)
            await until(lambda: _shows_that_it_serves(new), _METRICS_LIMIT_S)
        except (LocalServerError, TimeoutError) as error:
            self.rolled.problems.append(f"a new {old.name} was not ready: {error}")
            return
        ready = time.monotonic()
        in_time = await self._system.remove(old, self._limit_s)
        ended = time.monotonic()
        if not in_time:
            self.rolled.problems.append(
                f"{old.title} did not end within {self._limit_s:g} s of SIGTERM"
            )
        self.rolled.replaced += 1
        self.rolled.longest_end_s = max(self.rolled.longest_end_s, ended - ready)
        self._say(
            f"           {new.title} was ready after {ready - began:.1f} s, "
            f"{old.title} ended {ended - ready:.1f} s after SIGTERM"
        )


async def _shows_that_it_serves(service: Service) -> bool:
    """Return whether the metrics of a process can be scraped, and say that it is serving."""
    return await asyncio.to_thread(_scraped, service.metrics, service.name)


def _scraped(address: str, name: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return False
    return f'outbox_serving{{service="{name}"}} 1.0' in text
