"""A worker process: does jobs for a `WorkerPool`, within limits of CPU and memory.

`python -m outbox_server.shared.mail.worker BUDGET MEMORY` reads jobs from its standard input, a
stream socket, and writes the replies to the same socket. Each is a msgpack document after its
length, a big-endian 32-bit number. The process has no secrets, writes no files, and ends when its
parent does.

The jobs are done by a child of this process, a copy that is forked after the imports. The kernel
ends it if it uses more CPU than its budget for one step of a job (SIGPROF), even within a regular
expression. This process then sends the reply, and forks the next one: that takes a few milliseconds
of CPU, and a new Python a third of a second. The child counts the steps of its job in memory that
both share, so the reply says which step needed too much.
"""

from __future__ import annotations

import gc
import mmap
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from io import RawIOBase
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from cachetools import LRUCache

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.templates.batch import BatchTemplate
from outbox_server.shared.templates.checking import failure_of
from outbox_server.shared.templates.guard import Environments
from outbox_server.shared.templates.head import NO_HEAD, HeadTexts
from outbox_server.shared.templates.parsing import parse_source
from outbox_server.shared.templates.source import RenderError, Room, TemplateSource
from outbox_server.shared.templates.wire import (
    READY,
    StartBudget,
    WorkerReply,
    from_frame,
    length_of,
    to_frame,
)

# The characters of the templates whose parsed forms are kept. A parsed template takes up to 300
# bytes per character.
_KEPT_CHARACTERS: Final = 256 * 1024

# A template with more texts and insertions counts as Liquid for the process that asked, which would
# need too long to read them. Then whether a mail is too large shows only when it is built.
_MOST_PARTS: Final = 10_000
# The exit code of a process whose memory is full.
_USED_UP: Final = 3
# Lower than the priority of the event loops (19 is the lowest), which templates must not delay on a
# machine whose processors are all busy.
_NICENESS: Final = 10
_STEPS_BYTES: Final = 8
PARSING_BUDGETS: Final = 2.0
# The step of the check of rows before that of the first row.
STEPS_BEFORE_ROWS: Final = 2

Job: TypeAlias = Callable[..., object]


class RowsRequest(NamedTuple):
    """The templates by field, and the rows that are rendered with them, until a time is over."""

    sources: dict[str, str | None]
    longest: int
    names: Sequence[str]
    rows: Sequence[str | None]
    max_bytes: int
    most_seconds: float
    head: HeadTexts = NO_HEAD


def serve(jobs: Mapping[str, Callable[[StartBudget], Job]]) -> int:
    """Do jobs until the parent closes the connection. Each value makes the job with that name.

    A job begins with one budget. It may call the function that it was made with to get another one.
    """
    budget, memory = float(sys.argv[1]), int(sys.argv[2])
    _restrict(memory)
    # The modules are never freed, so garbage collection need not examine them.
    gc.freeze()
    with socket.socket(fileno=os.dup(0)) as connection, mmap.mmap(-1, _STEPS_BYTES) as steps:
        while True:
            child = os.fork()
            if not child:
                code = 1
                try:
                    code = _do_jobs(jobs, budget, connection, steps)
                finally:
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            if code == -signal.SIGPROF:
                step = int.from_bytes(steps[:], "big")
                connection.sendall(to_frame([int(WorkerReply.OVER_BUDGET), budget, step]))
            elif code != _USED_UP:
                # The parent has closed the connection, or it learns of the crash when this process
                # ends.
                return code


def _do_jobs(
    jobs: Mapping[str, Callable[[StartBudget], Job]],
    budget: float,
    connection: socket.socket,
    steps: mmap.mmap,
) -> int:
    """Do jobs until the parent closes the connection. Return the exit code."""
    step = 0

    def start_budget(budgets: float) -> None:
        nonlocal step
        signal.setitimer(signal.ITIMER_PROF, budget * budgets)
        step += 1
        steps[:] = step.to_bytes(_STEPS_BYTES, "big")

    made: dict[str, Job] = {name: make(start_budget) for name, make in jobs.items()}
    made[READY] = lambda: None
    # Unbuffered, so that the next process gets every job that this one has not begun.
    stream = connection.makefile("rwb", buffering=0)
    while (request := _read(stream)) is not None:
        step = 0
        start_budget(1.0)
        began = time.process_time()
        reply, result = _answer(made, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        spent = time.process_time() - began
        try:
            frame = to_frame([int(reply), spent, result])
        except MemoryError:
            reply = WorkerReply.OUT_OF_MEMORY
            frame = to_frame([int(reply), spent, None])
        try:
            connection.sendall(frame)
        except OSError:
            return 0
        if reply is WorkerReply.OUT_OF_MEMORY:
            return _USED_UP
    return 0


def _restrict(memory: int) -> None:
    # A terminal or a service manager signals the whole group. The parent decides when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(_NICENESS)
    # If the host or the container has no memory left, the kernel ends a worker and not the service.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _read(stream: RawIOBase) -> list[Any] | None:
    """Return the next job, or None if the parent is gone."""
    try:
        head = _exactly(stream, 4)
        request = from_frame(_exactly(stream, length_of(head)))
    except (OSError, EOFError, ValueError):
        return None
    return request if isinstance(request, list) else None


def _exactly(stream: RawIOBase, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        part = stream.read(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _answer(jobs: Mapping[str, Job], request: list[Any]) -> tuple[WorkerReply, object]:
    name, *arguments = request
    try:
        return WorkerReply.DONE, jobs[name](*arguments)
    except InvalidInput as error:
        (violation,) = error.violations
        return WorkerReply.INVALID, [violation.field, violation.description, error.reason]
    except RenderError as error:
        return WorkerReply.REFUSED, [error.reason, error.message]
    except MemoryError:
        return WorkerReply.OUT_OF_MEMORY, None
    except Exception as error:  # noqa: BLE001 - the parent logs it
        last = traceback.extract_tb(error.__traceback__)[-1]
        # The text is left out, because it may quote a mail.
        return WorkerReply.FAILED, f"{type(error).__name__} at {last.filename}:{last.lineno}"


class TemplateCache:
    """The parsed templates that were used last."""

    def __init__(self) -> None:
        self._environments = Environments()
        self._parsed: LRUCache[tuple[str, str, int], tuple[TemplateSource, int]] = LRUCache(
            _KEPT_CHARACTERS, lambda value: value[1]
        )

    def get(self, field: str, source: str, longest: int) -> TemplateSource:
        """Return a parsed template."""
        key = field, source, longest
        kept = self._parsed.get(key)
        if kept is not None:
            return kept[0]
        parsed = parse_source(field, source, longest, self._environments)
        if len(source) < _KEPT_CHARACTERS:
            self._parsed[key] = parsed, len(source) + 1
        return parsed

    def batch(
        self, sources: Mapping[str, str | None], head: HeadTexts, longest: int
    ) -> BatchTemplate:
        """Return the parsed templates of a batch, by the texts of subject, body and html."""
        return BatchTemplate(
            **{
                field: None if source is None else self.get(field, source, longest)
                for field, source in sources.items()
            },
            head=head.compiled(lambda field, text: self.get(field, text, longest)),
        )


def _summary_of(_: StartBudget) -> Job:
    environments = Environments()

    def parse(field: str, source: str, longest: int) -> object:
        summary = parse_source(field, source, longest, environments).summary
        if summary.parts is not None and len(summary.parts) > _MOST_PARTS:
            summary = summary._replace(parts=None)
        return summary.to_wire()

    return parse


def _text_of(start_budget: StartBudget) -> Job:
    templates = TemplateCache()

    def render(field: str, source: str, longest: int, values: dict[str, str], room: int) -> str:
        template = templates.get(field, source, longest)
        start_budget(1.0)
        return template.render(values, Room(room))

    return render


def _failures_of(start_budget: StartBudget) -> Job:
    templates = TemplateCache()

    def check(*arguments: Any) -> object:
        sources, longest, names, rows, max_bytes, most_seconds, head = RowsRequest(*arguments)
        # Templates that were accepted must not fail because they are parsed more slowly here.
        start_budget(PARSING_BUDGETS)
        template = templates.batch(sources, HeadTexts.from_wire(head), longest)
        ends = time.process_time() + most_seconds
        found = []
        done = 0
        for variables in rows:
            start_budget(1.0)
            failure = failure_of(template, names, variables, max_bytes)
            if failure is not None:
                found.append([done, *failure])
            done += 1
            if time.process_time() > ends:
                break
        return [done, found]

    return check


# The jobs of a worker process that need only templates.
TEMPLATE_JOBS: Final = {"parse": _summary_of, "render": _text_of, "check": _failures_of}
