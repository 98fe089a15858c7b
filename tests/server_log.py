"""Keeps the log of servers in this process out of the output of commands that run in it.

A command that runs in this process has `sys.stdout` for itself meanwhile. By default, structlog
writes to it as well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import structlog


class _ServerLog:
    """A stream that writes to the stdout of the test."""

    def __init__(self) -> None:
        self._held: TextIO | None = None

    def write(self, text: str) -> int:
        return (self._held or sys.stdout).write(text)

    def flush(self) -> None:
        (self._held or sys.stdout).flush()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Write to what is `sys.stdout` now, until the end of the block."""
        self._held, held = self._held or sys.stdout, self._held
        try:
            yield
        finally:
            self._held = held


SERVER_LOG = _ServerLog()


def write_log_apart() -> None:
    """Let structlog write to `SERVER_LOG`, whatever an earlier test has configured."""
    structlog.reset_defaults()
    # It only writes and flushes.
    factory = structlog.PrintLoggerFactory(SERVER_LOG)  # type: ignore[arg-type]
    structlog.configure(logger_factory=factory)
