"""The base of the embedded servers: a child process that keeps its port on loopback."""

from __future__ import annotations

import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import ClassVar, Final

from outbox_server.deploy.child import Child, LocalServerError
from outbox_server.deploy.ports import free_port

_PORT_TRIES: Final = 5


class LocalServer:
    """A server on loopback. It may be started again after `stop` or `kill`, on the same port."""

    NAME: ClassVar[str]
    # The signals that stop it, each with the seconds until the next one.
    STOP: ClassVar[tuple[tuple[signal.Signals, float], ...]]

    def __init__(self, folder: Path, port: int | None, log: Path | None) -> None:
        """Create a server that works in `folder`. `port` None means a free port."""
        self.folder = folder.resolve()
        self._wanted_port = port
        self._port = port
        self._log = log or self.folder.with_name(f"{folder.name}.log")
        self._child: Child | None = None

    @property
    def port(self) -> int:
        """The TCP port; known after the first start."""
        if self._port is None:
            raise RuntimeError(f"{self.NAME} was not started")
        return self._port

    @property
    def child(self) -> Child:
        """The server's process."""
        if self._child is None:
            raise RuntimeError(f"{self.NAME} was not started")
        return self._child

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._child is not None and self._child.running

    async def stop(self) -> None:
        """Stop cleanly, in at most about the time of `STOP`; do nothing if it does not run."""
        if self._child is not None:
            await self._child.stop(*self.STOP)

    async def _start(
        self,
        child_on: Callable[[int], Child],
        answers: Callable[[], Coroutine[None, None, bool]],
        limit: float,
        stop: tuple[tuple[signal.Signals, float], ...] = (),
    ) -> None:
        """Start the child that `child_on` creates for a port, and return once it answers.

        If another process takes a free port meanwhile, another one is tried. `stop` has the signals
        for a child that does not answer within `limit` seconds.

        Raises:
            LocalServerError: it did not start; the text quotes its log.
        """
        for tries_left in reversed(range(_PORT_TRIES)):
            self._port = self._port or free_port()
            self._child = child_on(self._port)
            self._child.start()
            try:
                await self._child.until_ready(answers, limit)
            except BaseException as error:
                await self._child.stop(*stop)
                if (
                    not isinstance(error, LocalServerError)
                    or self._wanted_port
                    or not tries_left
                    or "Address already in use" not in str(error)
                ):
                    raise
                self._port = None
            else:
                self._wanted_port = self._port  # clients use this port from now on
                return
