"""Dispatchers that kill themselves with -9 at one point of a send; the product has no such code.

Each is a separate process, forked with every module imported.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partialmethod
from inspect import iscoroutinefunction
from multiprocessing.process import BaseProcess
from typing import Any, Final, Never

import uvloop

from outbox_server.services.dispatcher import server, storage
from outbox_server.services.dispatcher.smtp.transaction import Transaction
from outbox_server.shared.queue.queue import Queue
from outbox_server.shared.smtp.commands import Answer
from tests.dispatchers import FORKS, settings_of

Arm = Callable[[int], None]


def _die() -> Never:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody outlives SIGKILL")


def _after(owner: Any, name: str, of_use: Callable[[Any], bool] = lambda _: True) -> Arm:
    """Return a function that arms a kill directly after a call whose result passes `of_use`."""

    def arm(visit: int) -> None:
        call = getattr(owner, name)
        visits = itertools.count(1)

        def look_at(answer: Any) -> None:
            if of_use(answer) and next(visits) == visit:
                _die()

        async def wrapped(*args: Any, **options: Any) -> Any:
            answer = await call(*args, **options)
            look_at(answer)
            return answer

        def wrapped_step(*args: Any, **options: Any) -> Any:
            answer = call(*args, **options)
            look_at(answer)
            return answer

        setattr(owner, name, wrapped if iscoroutinefunction(call) else wrapped_step)

    return arm


def _in_body(share: float) -> Arm:
    """Return a function that arms a kill once that share of a body and its dot is in the kernel."""
    begin = Transaction._begin_body
    visits = itertools.count(1)

    def cut(transaction: Transaction, visit: int) -> Answer | None:
        if next(visits) < visit:
            return begin(transaction)
        sent = transaction._envelope.data + b".\r\n"
        connection = transaction._stream.transport.get_extra_info("socket")
        # Bypasses the transport, which may write later.
        os.write(connection.fileno(), sent[: int(len(sent) * share)])
        _die()

    def arm(visit: int) -> None:
        Transaction._begin_body = partialmethod(cut, visit)  # type: ignore[assignment,method-assign]

    return arm


# In the order of a send; docs/send-path.md lists the steps between them.
POINTS: Final[Mapping[str, Arm]] = {
    "claimed": _after(Queue, "claim", lambda claimed: bool(claimed.claims)),
    "marked": _after(storage, "mark_sending", bool),
    "confirmed": _after(Queue, "confirm", any),
    "before_the_body": _after(Transaction, "_refusal", lambda refusal: refusal is None),
    "in_the_body": _in_body(0.5),
    "before_the_reply": _in_body(1.0),
    "after_the_reply": _after(Transaction, "_body_answer"),
    "recorded": _after(storage, "settle"),
    "released": _after(Queue, "settle"),
}


def _run(values: Mapping[str, str], point: str, visit: int) -> None:
    # As a service does: collections do not examine the modules, nor copy their memory.
    gc.freeze()
    POINTS[point](visit)
    uvloop.run(server.serve(settings_of(values), asyncio.Event()))


@asynccontextmanager
async def doomed(
    values: Mapping[str, str], point: str, visit: int = 1
) -> AsyncIterator[BaseProcess]:
    """Run a dispatcher that kills itself when it reaches the point for the nth time."""
    child = FORKS.Process(target=_run, args=(values, point, visit), daemon=True)
    await asyncio.to_thread(child.start)
    try:
        yield child
    finally:
        child.kill()
        await asyncio.to_thread(child.join)
