"""An SMTP server that performs a test's action in each phase of a session."""

from __future__ import annotations

import asyncio
import base64
import re
import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self, cast

_LINE_LIMIT: Final = 64 * 1024 * 1024
_MESSAGE_ID: Final = re.compile(rb"(?im)^message-id:\s*(\S+)\s*$")
_WELL: Final = {
    "greeting": "220 scripted.test ESMTP",
    "starttls": "220 2.0.0 go ahead",
    "auth": "235 2.7.0 welcome",
    "mail": "250 2.1.0 sender ok",
    "rcpt": "250 2.1.5 recipient ok",
    "data": "354 go ahead",
    "body": "250 2.0.0 taken",
    "noop": "250 2.0.0 nothing done",
    "rset": "250 2.0.0 reset",
    "quit": "221 2.0.0 bye",
}


@dataclass(frozen=True)
class Say:
    """Answer with this text, which has no line end."""

    text: str | bytes


@dataclass(frozen=True)
class Close:
    """Close the connection without a reply."""


@dataclass(frozen=True)
class Wait:
    """Send nothing until the event is set; if it is never set, the server hangs."""

    event: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class StopReading:
    """Read nothing from the network until the event is set."""

    event: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Succeed:
    """Answer with success."""


Step = Say | Close | Wait | StopReading | Succeed
# The behaviour in a phase: steps that run one after the other.
Action = Step | tuple[Step, ...]


@dataclass
class Conversation:
    """The data that a server received on one connection."""

    helo: str = ""
    # The mails begun with MAIL, including the current one, and the accepted mails.
    begun: int = 0
    taken: int = 0


# An action that depends on the connection.
Habit = Callable[[Conversation], Action]


@dataclass
class TakenMail:
    """A mail whose body was received completely. Times are seconds since 1970."""

    mail_from: str
    rcpt_to: str
    # As received: dots still doubled, without the final dot.
    data: bytes
    # At MAIL FROM, and at the end of the body.
    started_at: float
    received_at: float
    # The server has answered 250.
    answered: bool = False

    @property
    def message_id(self) -> str:
        found = _MESSAGE_ID.search(self.data)
        return found[1].decode() if found else ""


class ScriptedServer:
    """Accepts every mail on loopback, except where `plan` names an action for a phase.

    Phases: greeting, ehlo, starttls, auth, mail, rcpt, data, body, noop, rset, quit. A list in the
    plan is used up: one action each time that the phase is reached. Any other action applies every
    time. A function gets the connection's conversation and returns an action.
    `visits` counts how often each phase was reached, `waiting` how many sessions wait in it.
    """

    def __init__(
        self,
        plan: Mapping[str, Any] | None = None,
        *,
        extensions: Sequence[str] = ("8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES"),
        tls: ssl.SSLContext | None = None,
        implicit_tls: bool = False,
        byte_by_byte: bool = False,
        careless: bool = False,
    ) -> None:
        # Actions, or lists of them, by phase.
        self.plan = dict(plan or {})
        self.visits: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()
        self.taken: list[TakenMail] = []
        # Bytes of bodies, including incomplete ones.
        self.body_bytes = 0
        self.commands: list[str] = []
        # The time of each MAIL FROM, including refused ones, in seconds since 1970.
        self.began: list[float] = []
        self.connections = 0
        self.most_open = 0
        # The end of each connection: "QUIT", or "close" for every other end.
        self.endings: list[str] = []
        self.open: set[asyncio.StreamWriter] = set()
        self._extensions = extensions
        self._tls = tls
        self._implicit_tls = implicit_tls
        self._byte_by_byte = byte_by_byte
        # Answers RCPT and DATA as if all earlier commands had been accepted.
        self._careless = careless
        self._server: asyncio.Server | None = None
        self._port: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        assert self._port is not None
        return self._port

    @property
    def url(self) -> str:
        return f"smtp://127.0.0.1:{self.port}"

    def count(self, message_id: str) -> int:
        """Return how many copies of a mail were accepted."""
        return sum(mail.message_id == message_id for mail in self.taken)

    async def start(self) -> None:
        """Listen; after a `stop`, on the same port again."""
        self._server = await asyncio.start_server(
            self._connected,
            "127.0.0.1",
            self._port or 0,
            limit=_LINE_LIMIT,
            ssl=self._tls if self._implicit_tls else None,
        )
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and cut every connection."""
        if self._server is None:
            return
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    def cut(self) -> None:
        """Cut every connection, as a server does with idle clients."""
        for writer in tuple(self.open):
            writer.transport.abort()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.open.add(writer)
        self.connections += 1
        self.most_open = max(self.most_open, len(self.open))
        session = _Session(self, reader, writer)
        try:
            await session.run()
        except (OSError, EOFError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self.endings.append(session.ending)
            self.open.discard(writer)
            writer.transport.abort()

    def _action(self, phase: str, conversation: Conversation) -> tuple[Step, ...]:
        action = self.plan.get(phase, Succeed())
        if callable(action):
            action = action(conversation)
        if isinstance(action, list):
            action = action.pop(0) if action else Succeed()
        return action if isinstance(action, tuple) else (action,)


class _Session:
    def __init__(
        self, server: ScriptedServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self._began = 0.0
        self._from = ""
        self._to = ""
        self._conversation = Conversation()
        # The phases of the current mail that were accepted: MAIL and RCPT.
        self._accepted: set[str] = set()
        self.ending = "close"

    async def run(self) -> None:
        await self._do("greeting")
        while line := await self._reader.readline():
            command = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
            self._server.commands.append(command)
            await self._answer_command(command)

    async def _answer_command(self, command: str) -> None:
        verb = command.partition(" ")[0].upper()
        if verb == "MAIL":
            self._began = time.time()
            self._conversation.begun += 1
            self._server.began.append(self._began)
            self._from = command[command.index("<") + 1 : command.index(">")]
        elif verb == "RCPT":
            self._to = command[command.index("<") + 1 : command.index(">")]
        elif verb in {"EHLO", "HELO"}:
            self._conversation.helo = command.partition(" ")[2]
        phase = "ehlo" if verb == "HELO" else verb.lower()
        if needed := self._missing(phase):
            await self._say(needed)
            return
        if phase not in {*_WELL, "ehlo"}:
            await self._say("502 5.5.1 no such command")
            return
        answer = await self._do(phase)
        self._remember(phase, answer)
        if phase == "starttls" and answer == "220":
            await self._writer.start_tls(self._server._tls)  # type: ignore[arg-type]
        elif phase == "data" and answer == "354":
            await self._take_body()
        elif phase == "quit":
            self.ending = "QUIT"
            raise EOFError

    def _remember(self, phase: str, answer: str) -> None:
        if phase in {"mail", "rcpt"} and answer[:1] == "2":
            self._accepted.add(phase)
        elif phase in {"data", "rset"}:
            self._accepted.clear()

    def _missing(self, phase: str) -> str:
        """Return the refusal of a command whose predecessor was refused."""
        if self._server._careless:
            return ""
        if phase == "rcpt" and "mail" not in self._accepted:
            return "503 5.5.1 MAIL first"
        if phase == "data" and "rcpt" not in self._accepted:
            return "554 5.5.1 no valid recipients"
        return ""

    async def _take_body(self) -> None:
        lines: list[bytes] = []
        while (line := await self._reader.readline()) != b".\r\n":
            self._server.body_bytes += len(line)
            if not line.endswith(b"\n"):
                raise EOFError
            lines.append(line)
        mail = TakenMail(self._from, self._to, b"".join(lines), self._began, time.time())
        self._server.taken.append(mail)
        answer = await self._do("body")
        mail.answered = answer == "250"
        self._conversation.taken += answer[:1] == "2"

    async def _do(self, phase: str) -> str:
        """Perform the plan of a phase; return the first three characters of the answer."""
        self._server.visits[phase] += 1
        said = ""
        for step in self._server._action(phase, self._conversation):
            match step:
                case Say(text):
                    said = await self._say(text)
                case Succeed():
                    said = await self._say(self._well(phase))
                case Wait(event):
                    await self._wait(phase, event)
                case StopReading(event):
                    await self._stop_reading(phase, event)
                case Close():
                    raise EOFError
        return said

    async def _stop_reading(self, phase: str, event: asyncio.Event) -> None:
        transport = cast(asyncio.Transport, self._writer.transport)
        transport.pause_reading()
        self._server.waiting[phase] += 1
        await event.wait()
        self._server.waiting[phase] -= 1
        transport.resume_reading()

    async def _wait(self, phase: str, event: asyncio.Event) -> None:
        """Wait for the event, or until the client closes the connection."""
        self._server.waiting[phase] += 1
        if self._reader._buffer:  # type: ignore[attr-defined]  # what a client has pipelined
            await event.wait()
            self._server.waiting[phase] -= 1
            return
        # A client sends nothing while it waits for an answer, so this read ends only at its close.
        closed = asyncio.create_task(self._reader.read(1))
        waiting = asyncio.create_task(event.wait())
        try:
            await asyncio.wait([closed, waiting], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._server.waiting[phase] -= 1
            for task in (closed, waiting):
                task.cancel()
            await asyncio.gather(closed, waiting, return_exceptions=True)
        if not event.is_set():
            raise EOFError

    def _well(self, phase: str) -> str:
        if phase != "ehlo":
            return _WELL[phase]
        offered = list(self._server._extensions)
        secure = self._writer.get_extra_info("ssl_object") is not None
        if self._server._tls and not secure:
            offered.append("STARTTLS")
        lines = ["scripted.test", *offered]
        return "\r\n".join(f"250{' ' if line is lines[-1] else '-'}{line}" for line in lines)

    async def _say(self, text: str | bytes) -> str:
        data = (text.encode() if isinstance(text, str) else text) + b"\r\n"
        pieces = [data]
        if self._server._byte_by_byte:
            pieces = [data[i : i + 1] for i in range(len(data))]
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()
            await asyncio.sleep(0)  # one piece per turn of the event loop
        return data[:3].decode("ascii", "replace")


def plain_login(user: str, password: str) -> str:
    """Return the response of AUTH PLAIN on the wire (RFC 4616)."""
    return base64.b64encode(f"\0{user}\0{password}".encode()).decode()


class CrowdedServer(ScriptedServer):
    """Performs an action in one phase, on every connection above its limit."""

    def __init__(self, most: int, phase: str, action: Action, **plan: Any) -> None:
        super().__init__({phase: self._look, **plan})
        self.most = most
        self.refused = 0
        self._answer = action

    def _look(self, heard: Conversation) -> Any:
        del heard
        if len(self.open) <= self.most:
            return Succeed()
        self.refused += 1
        return self._answer
