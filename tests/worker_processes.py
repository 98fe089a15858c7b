"""Finds the worker processes of templates below a process."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.processes import alive, arguments_of, children

WORKER = "outbox_server.shared.mail.worker"


@dataclass(frozen=True)
class WorkerProcess:
    """A worker process that was found."""

    pid: int

    def is_running(self) -> bool:
        """Return whether it has not ended. One that waits for its parent has."""
        return alive(self.pid)

    def cpu_seconds(self) -> float:
        """Return the processor time that it has used; 0 once it has ended."""
        try:
            times = psutil.Process(self.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def environment(self) -> set[str]:
        """Return the names of its environment variables."""
        data = Path(f"/proc/{self.pid}/environ").read_bytes()
        return {entry.partition(b"=")[0].decode() for entry in data.split(b"\0") if entry}

    def memory_limit(self) -> tuple[int, int]:
        """Return the limits of its address space, in bytes."""
        return resource.prlimit(self.pid, resource.RLIMIT_AS)

    def ended_first(self) -> int:
        """Return how soon the kernel ends it when memory is short: at most 1,000."""
        return int(Path(f"/proc/{self.pid}/oom_score_adj").read_text(encoding="ascii"))

    def peak_memory(self) -> int:
        """Return the most memory that it has had, in bytes."""
        text = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        (line,) = [each for each in text.splitlines() if each.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024

    def kill(self) -> None:
        """End it with kill -9."""
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)


def workers_of(pid: int, module: str) -> list[WorkerProcess]:
    """Return the processes that do the jobs of a module for a process.

    Each is the child of a child of that process.
    """
    first = [each for each in children(pid) if module in arguments_of(each)]
    found = [WorkerProcess(each) for parent in first for each in children(parent)]
    return [each for each in found if each.is_running()]


def workers_here(module: str = WORKER) -> list[WorkerProcess]:
    """Return the workers of this process."""
    return workers_of(os.getpid(), module)
