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
from tests.server_log import SERVER_LOG


@dataclass(frozen=True)
class CommandResult:
    """The exit code and output of a command."""

    exit_code: int
    stdout: str
    stderr: str


def run(words: list[str], stdin: bytes = b"") -> CommandResult:
    """Run a command in this process, because Python takes a second to start."""
    with SERVER_LOG.apart():
        done = CliRunner().invoke(app, words, input=stdin)
    return CommandResult(done.exit_code, done.stdout, done.stderr)


def run_process(words: list[str], stdin: bytes) -> CommandResult:
    """Run a command as a process that reads a pipe."""
    ended = subprocess.run(
        [Path(sys.executable).with_name("outbox"), *words],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=PATIENCE,
    )
    return CommandResult(ended.returncode, ended.stdout.decode(), ended.stderr.decode())


async def outbox(scheduler: Scheduler, *words: str, stdin: bytes = b"") -> CommandResult:
    return await asyncio.to_thread(run, [*words, "--server", scheduler.address], stdin)
