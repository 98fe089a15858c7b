"""Runs a server as a child process that ends with its parent, and waits for events of it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
import pwd
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Final

from outbox_server.deploy.private_files import open_private
from outbox_server.shared.errors import OutboxError

_LAST_LINES: Final = 15
_POLL: Final = 0.01
_PR_SET_PDEATHSIG: Final = 1
_APPEND: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT
# A child does not inherit this process's environment, such as PG* variables and secrets.
CHILD_ENVIRONMENT: Final = {"PATH": os.defpath, "LC_ALL": "C"}


class LocalServerError(OutboxError):
    """An embedded server did not start or ended by itself; the text quotes the end of its log."""

    default_reason = "LOCAL_SERVER_FAILED"


class Child:
    """One process in a session of its own, whose output is appended to a log file.

    It gets `death_signal` when the thread that called `start` ends, even at a kill -9 of the parent
    (Linux: prctl(2), PR_SET_PDEATHSIG). So start it from a thread that lives long enough. Because
    of its own session, Ctrl-C in the terminal does not reach it: its owner stops it, after the
    processes that use it.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        log: Path,
        cwd: Path,
        user: pwd.struct_passwd | None = None,
        environment: Mapping[str, str] = CHILD_ENVIRONMENT,
        death_signal: signal.Signals = signal.SIGKILL,
        stdin: str = "",
    ) -> None:
        """The process reads `stdin`: use it for secrets, because all users can see arguments."""
        self.name = name
        self._argv = [str(word) for word in argv]
        self._log = log
        self._cwd = cwd
        self._user = user
        # Takes effect at the next start.
        self.environment = dict(environment)
        self._death_signal = death_signal
        self._stdin = stdin.encode()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id of the running child."""
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process, and return before it is ready."""
        self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A log may quote what only its owner may see.
        with (
            os.fdopen(open_private(self._log, _APPEND), "ab") as output,
            tempfile.TemporaryFile() as stdin,
        ):
            stdin.write(self._stdin)
            stdin.seek(0)
            self._process = subprocess.Popen(  # noqa: S603 - our own command line
                self._argv,
                cwd=self._cwd,
                env=self.environment,
                stdin=stdin,
                stdout=output,
                stderr=output,
                start_new_session=True,
                user=self._user.pw_uid if self._user else None,
                group=self._user.pw_gid if self._user else None,
                extra_groups=[] if self._user else None,
                # Runs after the change of user, which would clear the death signal.
                preexec_fn=_die_with_parent(self._death_signal),  # noqa: PLW1509
            )

    async def wait(self) -> int:
        """Return the exit code once the process has ended; a negative one is a signal."""
        process = self._process
        if process is None:
            raise RuntimeError(f"{self.name} was not started")
        if process.poll() is None:
            await _ended(process)
        return process.wait()

    async def until_ready(
        self, is_ready: Callable[[], Coroutine[None, None, bool]], limit: float
    ) -> None:
        """Call `is_ready` until it returns True, for at most `limit` seconds.

        Raises:
            LocalServerError: the process ended first, or the time is over.
        """
        ended = asyncio.create_task(self.wait())
        try:
            async with asyncio.timeout(limit):
                while not ended.done():
                    if await _first(is_ready(), ended):
                        return
                    # Pause before the next try; the end of the process ends the pause.
                    await asyncio.wait({ended}, timeout=_POLL)
        except TimeoutError:
            raise LocalServerError(
                f"{self.name} was not ready after {limit:g} s{self.tail()}"
            ) from None
        finally:
            ended.cancel()
        raise LocalServerError(f"{self.name} did not start{self.tail()}")

    async def stop(self, *steps: tuple[signal.Signals, float]) -> None:
        """Send each signal and wait its number of seconds, until the process has ended.

        SIGKILL follows the last step, so the process always ends.
        """
        for number, seconds in steps:
            if not self.running:
                return
            self.signal(number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wait(), seconds)
        if self.running:
            self.signal(signal.SIGKILL)
            await self.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process still runs."""
        if self._process is not None:
            self._process.send_signal(number)

    def tail(self) -> str:
        """Return the last lines of the log, to append to an error message."""
        try:
            lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        except FileNotFoundError:
            lines = []
        return f"; {self._log} ends with:\n" + "\n".join(lines)


async def run_to_end(child: Child, limit: float) -> None:
    """Start a process that ends by itself, and wait for it.

    Raises:
        LocalServerError: its exit code is not 0, or it took longer than `limit` seconds.
    """
    child.start()
    try:
        code = await asyncio.wait_for(child.wait(), limit)
    except TimeoutError:
        raise LocalServerError(f"{child.name} took longer than {limit:g} s{child.tail()}") from None
    finally:
        await child.stop()
    if code:
        raise LocalServerError(f"{child.name} ended with {code}{child.tail()}")


def processes_in(folder: Path, name: str) -> dict[int, bool]:
    """Return the processes of a server whose working directory is `folder`; True for the leader.

    The working directory is reliable, while the pid in a pid file may belong to another process by
    now. A child of the leader (PostgreSQL's) has the title `name: what it does`. The result is
    empty on systems without /proc.
    """
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        # Skip a process that has ended or belongs to another user.
        with contextlib.suppress(OSError):
            if (entry / "comm").read_text().strip() != name or (entry / "cwd").readlink() != folder:
                continue
            title = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            if title:  # else it is a zombie
                found[int(entry.name)] = title.rpartition("/")[2].split(" ")[0] == name
    return found


async def stop_orphans(
    folder: Path, name: str, steps: Sequence[tuple[signal.Signals, float]]
) -> None:
    """End the processes that a dead parent left running in `folder`, by signals with a time each.

    Only the leader gets them, as its children end with it. SIGKILL, the last step, goes to all.

    Raises:
        LocalServerError: they cannot be ended.
    """
    for number, seconds in (*steps, (signal.SIGKILL, 5.0)):
        left = processes_in(folder, name)
        for pid, leads in left.items():
            if leads or number == signal.SIGKILL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        end = time.monotonic() + seconds
        while left and time.monotonic() < end:
            # They are not our children, so there is no event to wait for.
            await asyncio.sleep(_POLL)
            left = processes_in(folder, name)
        if not left:
            return
    raise LocalServerError(f"processes {sorted(left)} use {folder} and cannot be ended")


async def _first(asked: Coroutine[None, None, bool], ended: asyncio.Task[int]) -> bool:
    """Return the answer, or False once the process has ended, as then no answer may come."""
    answer = asyncio.create_task(asked)
    try:
        await asyncio.wait({answer, ended}, return_when=asyncio.FIRST_COMPLETED)
        return answer.done() and answer.result()
    finally:
        answer.cancel()
        # It closes its connection before the caller goes on.
        await asyncio.wait({answer})


async def _ended(process: subprocess.Popen[bytes]) -> None:
    if not hasattr(os, "pidfd_open"):
        while process.poll() is None:  # noqa: ASYNC110 - not Linux: nothing to wait on
            await asyncio.sleep(_POLL)
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    descriptor = os.pidfd_open(process.pid)
    try:
        loop.add_reader(descriptor, ended.set)
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _die_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    prctl = _libc().prctl  # looked up here, because the forked child must not lock the loader
    parent = os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # the parent died between fork and prctl
            os._exit(1)

    return prepare
