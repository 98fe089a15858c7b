"""Runs the `outbox` command, in this process or as a separate one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from outbox_server.cli.main import app
from tests.eventually import PATIENCE
from tests.scheduler_stack import Scheduler


@dataclass(frozen=True)
class CommandResult:
    """The exit code and output of a command."""

    exit_code: int
    stdout: str
    stderr: str


def run(words: list[str], stdin: bytes | None = None) -> CommandResult:
    """Run a command in this process. With `stdin`, run it as a process that reads a pipe."""
    if stdin is None:
        done = CliRunner().invoke(app, words)
        return CommandResult(done.exit_code, done.stdout, done.stderr)
    ended = subprocess.run(
        [Path(sys.executable).with_name("outbox"), *words],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=PATIENCE,
    )
    return CommandResult(ended.returncode, ended.stdout.decode(), ended.stderr.decode())


async def outbox(scheduler: Scheduler, *words: str, stdin: bytes | None = None) -> CommandResult:
    return await asyncio.to_thread(run, [*words, "--server", scheduler.address], stdin)
