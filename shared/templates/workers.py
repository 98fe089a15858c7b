"""Runs jobs of untrusted templates in worker processes, whose CPU and memory are limited.

A job that needs more than its budget ends with its process, and the pool starts another one. Places
are shared fairly between users. So a user whose templates are expensive delays only its own jobs.
With N workers and K such users, a job of another user waits for at most K / N jobs, and for none if
K < N. A job takes at most three budgets of CPU: two to parse the templates, one to use them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from enum import Enum, auto
from typing import Final, Self, TypeVar

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from outbox_server.shared.durations import format_duration
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.fair_shares import Claimant, FairShares
from outbox_server.shared.settings import Settings
from outbox_server.shared.templates.source import RenderError
from outbox_server.shared.templates.wire import READY, WorkerReply, from_frame, length_of, to_frame

T = TypeVar("T")

# A new process imports the library for 0.2 s of CPU, on a busy machine for much longer.
_START_LIMIT_S: Final = 30.0
# The longest time that a job may take. The kernel ends it after its budget of CPU. This limit
# matters only if the worker gets no CPU or is stopped.
_JOB_LIMIT_S: Final = 60.0
# Lower priority than the services: an expensive template slows down other templates first.
_NICE: Final = 2
# The maximum number of bytes of a reply besides a mail.
_REPLY_BYTES: Final = 4 * 1024 * 1024
# The maximum number of jobs that wait for a worker. Further jobs are refused, and a dispatcher
# tries them again later.
_WAITING: Final = 4_096
# It is longer than any caller waits, because callers have limits of their own.
_WAIT_LIMIT: Final = timedelta(minutes=5)
_log = structlog.get_logger("outbox.templates")


class TooCostlyError(Exception):
    """A job needed more CPU or memory than it may use. The text says what and how much.

    `step` is the number, from 1, of the job's step that did; 0 if it is not known.
    """

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


class WorkerLostError(Exception):
    """The worker ended or failed although its job was not known to be too costly."""


class JobResult(Enum):
    """How a job ended, as a label of the metric."""

    DONE = auto()
    REFUSED = auto()
    TOO_COSTLY = auto()
    LOST = auto()


class WorkerPool:
    """Worker processes of one module. They are started when the first job comes."""

    def __init__(
        self,
        module: str,
        settings: Settings,
        registry: CollectorRegistry | None = None,
        *,
        budget: timedelta | None = None,
    ) -> None:
        """Run `module`. `budget` is the CPU time of a step; None means OUTBOX_TEMPLATE_BUDGET.

        Without a registry the metrics are counted, but not shown.
        """
        self._budget = settings.template_budget if budget is None else budget
        self._memory = settings.template_memory
        self._command = (
            *(sys.executable, "-P", "-m", module),
            *(str(self._budget.total_seconds()), str(self._memory)),
        )
        self._most_reply = settings.max_message_bytes + _REPLY_BYTES
        self._places = FairShares(
            "template workers",
            settings.template_workers,
            waiting=_WAITING,
            patience=_WAIT_LIMIT,
            operators=0,
        )
        self._slots = [_Slot(self._command) for _ in range(settings.template_workers)]
        self._free = list(self._slots)
        self._closed = False
        registry = registry or CollectorRegistry()
        jobs = Counter(
            "outbox_template_jobs",
            "What worker processes parsed or rendered, by result.",
            ["result"],
            registry=registry,
        )
        self._ended = {each: jobs.labels(each.name.lower()) for each in JobResult}
        Gauge(
            "outbox_template_jobs_waiting",
            "Jobs that wait for a worker process.",
            registry=registry,
        ).set_function(lambda: self._places.waiting)

    async def run(
        self,
        user: str,
        job: str,
        *arguments: object,
        decode: Callable[[object], T],
        wait: float | None = None,
    ) -> tuple[T, float]:
        """Do a job for a user. Return its decoded result, and the seconds of CPU that it took.

        Raises:
            TimeoutError: no worker was free for `wait` seconds. A job that has begun goes on.
            ResourceExhausted: too many jobs wait for a worker.
            InvalidInput: the template is wrong.
            RenderError: the row does not fit the template.
            TooCostlyError: it needs too much CPU or memory.
            WorkerLostError: it can be tried again later.
        """
        frame = to_frame([job, *arguments])
        for again in (False, True):
            async with asyncio.timeout(wait):
                await self._places.take(Claimant(user))
            answer = await self._try(user, frame, decode, fresh=again)
            if answer is not None:
                self._ended[JobResult.DONE].inc()
                return answer
            self._ended[JobResult.LOST].inc()
        raise WorkerLostError("the worker process for templates failed twice")

    def begin_start(self) -> None:
        """Begin to start the processes, because jobs will come soon."""
        if not self._closed:
            for each in self._slots:
                each.begin_start()

    async def close(self) -> None:
        """End all processes. A job that is under way fails."""
        self._closed = True
        for slot in self._slots:
            await slot.end()

    async def _try(
        self, user: str, frame: bytes, decode: Callable[[object], T], *, fresh: bool
    ) -> tuple[T, float] | None:
        """Do a job in one worker, which `fresh` replaces first. None means that it was lost.

        The user has a place, which is given back.
        """
        for each in self._slots:
            each.begin_start()
        slot = max(self._free, key=lambda each: each.is_ready)
        self._free.remove(slot)
        usable = False
        try:
            if self._closed:
                raise WorkerLostError("the process is ending")
            worker = await slot.worker(fresh=fresh)
            first = not worker.jobs
            reply, cpu, result = await worker.do(frame, self._most_reply)
            answer = None
            if reply is WorkerReply.DONE:
                answer = decode(result), cpu
            error = self._error_of(reply, result, first=first)
            usable = reply is not WorkerReply.FAILED
            if reply in (WorkerReply.OVER_BUDGET, WorkerReply.OUT_OF_MEMORY):
                worker.jobs = 0
        except (OSError, EOFError, ValueError, TimeoutError) as lost:
            code = await slot.end()
            _log.warning("template_worker_lost", exit_code=code, error=type(lost).__name__)
            return None
        else:
            if error is not None:
                costly = isinstance(error, TooCostlyError)
                self._ended[JobResult.TOO_COSTLY if costly else JobResult.REFUSED].inc()
                raise error
            return answer
        finally:
            if not usable:
                await slot.end()
            self._give_back(slot, user)

    def _error_of(self, reply: WorkerReply, value: object, *, first: bool) -> Exception | None:
        """Return the error that a worker replied; `first` says that this was its first job.

        Raises:
            ValueError: it replied something else.
        """
        match reply, value:
            case WorkerReply.DONE, _:
                return None
            case WorkerReply.INVALID, [str(field), str(description), str(reason)]:
                return InvalidInput.field(field, description, reason=reason)
            case WorkerReply.REFUSED, [str(reason), str(message)]:
                return RenderError(reason, message)
            case WorkerReply.FAILED, str(text):
                _log.error("template_job_failed", error=text[:200])
                return None
            case WorkerReply.OVER_BUDGET, int(step):
                return TooCostlyError(
                    f"needs more than {format_duration(self._budget)} of processor time "
                    "(OUTBOX_TEMPLATE_BUDGET)",
                    step,
                )
            case WorkerReply.OUT_OF_MEMORY, _:
                # Otherwise templates of other users may have filled the memory.
                return (
                    TooCostlyError(
                        f"needs more than {self._memory:,} bytes of memory (OUTBOX_TEMPLATE_MEMORY)"
                    )
                    if first
                    else None
                )
        raise ValueError("not a reply")

    def _give_back(self, slot: _Slot, user: str) -> None:
        """Give back a user's place, once a process that it has used up is replaced.

        So the user waits for the start of a process, and no other user does.
        """

        def give_back(_: object = None) -> None:
            self._free.append(slot)
            self._places.give_back(Claimant(user))

        if self._closed:
            give_back()
        else:
            slot.begin_start().add_done_callback(give_back)


class _Slot:
    """The place of one process, which may be starting."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._starting: asyncio.Task[_Worker] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether its process can do a job at once."""
        starting = self._starting
        return starting is not None and starting.done() and not starting.exception()

    def begin_start(self) -> asyncio.Task[_Worker]:
        """Begin to start a process, unless there is one. Return the task that starts it."""
        started = self._starting
        if started is not None and not (started.done() and started.exception()):
            return started
        self._starting = asyncio.create_task(_Worker.start(self._command))
        # If nobody waits for the start, an error shows with the next job.
        self._starting.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._starting

    async def worker(self, *, fresh: bool) -> _Worker:
        """Return the process once it has started; `fresh` replaces one that has done jobs.

        Raises:
            OSError, EOFError, ValueError, TimeoutError: it could not be started.
        """
        worker = await asyncio.shield(self.begin_start())
        if fresh and worker.jobs:
            await self.end()
            worker = await asyncio.shield(self.begin_start())
        return worker

    async def end(self) -> int | None:
        """End the process. Return its exit code; None if there was none."""
        starting, self._starting = self._starting, None
        if starting is None:
            return None
        starting.cancel()
        (worker,) = await asyncio.gather(starting, return_exceptions=True)
        return await worker.end() if isinstance(worker, _Worker) else None


class _Worker:
    """One process, and the connection to it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self.jobs = 0

    @classmethod
    async def start(cls, command: Sequence[str]) -> Self:
        """Start a process and wait until it answers.

        Raises:
            OSError, EOFError, ValueError, TimeoutError: it cannot be started, or does not answer.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = _spawn(command, theirs)
            except BaseException:
                ours.close()
                raise
        try:
            reader, writer = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()
            _kill(process)
            process.wait()
            raise
        worker = cls(process, reader, writer)
        try:
            async with asyncio.timeout(_START_LIMIT_S):
                await worker.do(to_frame([READY]), _REPLY_BYTES)
        except BaseException:
            await worker.end()
            raise
        worker.jobs = 0
        return worker

    async def do(self, frame: bytes, most_reply: int) -> tuple[WorkerReply, float, object]:
        """Do one job.

        Raises:
            OSError, EOFError: the process has ended.
            ValueError: it replied something else.
            TimeoutError: the job took too long.
        """
        self.jobs += 1
        async with asyncio.timeout(_JOB_LIMIT_S):
            if self._writer.is_closing():  # uvloop would raise RuntimeError
                raise ConnectionResetError("the worker process has ended")
            self._writer.write(frame)
            await self._writer.drain()
            size = length_of(await self._reader.readexactly(4))
            if size > most_reply:
                raise ValueError(f"a reply of {size} bytes")
            document = from_frame(await self._reader.readexactly(size))
        match document:
            case [int(reply), float(cpu), result]:
                return WorkerReply(reply), cpu, result
        raise ValueError("not a reply")

    async def end(self) -> int:
        """End the process and return its exit code."""
        self._writer.transport.abort()
        _kill(self._process)
        # In a thread, because freeing much memory takes a moment.
        return await asyncio.to_thread(self._process.wait)


def _spawn(command: Sequence[str], connection: socket.socket) -> subprocess.Popen[bytes]:
    # The environment may have secrets of the service in OUTBOX_*. The modules are the same.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100 - "" too
    process = subprocess.Popen(  # noqa: S603 - a module of ours
        command,
        stdin=connection.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # The zone is set, so that `now` does not depend on that of the host.
        env=kept | {"PYTHONPATH": path, "TZ": "UTC"},
        cwd="/",
        # The process and its child are a group, which is ended as a whole.
        process_group=0,
    )
    with suppress(OSError):  # it has ended already
        os.setpriority(os.PRIO_PROCESS, process.pid, _NICE)
    return process


def _kill(process: subprocess.Popen[bytes]) -> None:
    # The group exists until the process has been waited for, and nobody else waits for it.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
