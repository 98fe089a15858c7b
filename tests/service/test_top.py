"""`outbox top` over a pseudo-terminal, against real services."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from outbox.v1.sender_pb2 import SENDER_STATE_PAUSED
from outbox.v1.sender_service_pb2 import GetSenderRequest

from outbox_server.deploy.ports import free_port
from outbox_server.shared.rpc.proto_mapping import to_timestamp
from tests import cooldowns
from tests.dispatchers import options, running, settings_of
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import Scheduler, running_scheduler
from tests.smtp_servers import ScriptedServer
from tests.stats_stack import running_stats

COMMAND = (str(Path(sys.executable).parent / "outbox"), "top", "--user", "ann")


@dataclass
class Terminal:
    """The other side of a command's terminal."""

    master: int
    slave: int
    process: asyncio.subprocess.Process
    seen: bytearray = field(default_factory=bytearray)

    def read(self) -> None:
        self.seen += os.read(self.master, 65_536)

    def shows(self, text: str) -> bool:
        return text.encode() in self.seen

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())


def environment(scheduler: Scheduler, stats: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")},
        "OUTBOX_SCHEDULER_LISTEN": scheduler.address,
        "OUTBOX_STATS_LISTEN": stats,
        "OUTBOX_DISPATCHER_LISTEN": f"127.0.0.1:{free_port()}",
        "TERM": "xterm-256color",
        "COLUMNS": "120",
        "LINES": "40",
    }


@asynccontextmanager
async def terminal(values: dict[str, str], folder: Path) -> AsyncIterator[Terminal]:
    master, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *COMMAND, stdin=slave, stdout=slave, stderr=slave, env=values, cwd=folder
    )
    screen = Terminal(master, slave, process)
    loop = asyncio.get_running_loop()
    loop.add_reader(master, screen.read)
    try:
        yield screen
    finally:
        loop.remove_reader(master)
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(master)
        os.close(slave)


@pytest.fixture
async def scheduler(database_url: str, redis_url: str) -> AsyncIterator[Scheduler]:
    async with running_scheduler(database_url, redis_url, stats_listen="127.0.0.1:0") as running:
        yield running


@pytest.fixture
async def stats(scheduler: Scheduler) -> AsyncIterator[str]:
    async with running_stats(scheduler.settings) as address:
        yield address


async def test_top_shows_pauses_resumes_explains_and_restores_the_terminal(
    scheduler: Scheduler, stats: str, tmp_path: Path
) -> None:
    first = await scheduler.sender(email="first@x.org", hourly_limit=77)
    second = await scheduler.sender(email="second@x.org")
    later = datetime.now(UTC) + timedelta(hours=5)
    await scheduler.schedule(second, "email\na@b.org\n", schedule_time=to_timestamp(later))
    await scheduler.schedule(second, "email\nb@b.org\n")

    async def paused(sender_id: str) -> bool:
        request = GetSenderRequest(sender_id=sender_id)
        found = await scheduler.senders.GetSender(request)
        return bool(found.state == SENDER_STATE_PAUSED)

    async def resumed() -> bool:
        return not await paused(second.sender_id)

    async with terminal(environment(scheduler, stats), tmp_path) as screen:
        before = termios.tcgetattr(screen.slave)
        await eventually(lambda: screen.shows("second@x.org") and screen.shows("0/77"))
        await eventually(lambda: screen.shows("nothing waits"))
        screen.type("\x1b[B")
        screen.type("p")
        await eventually(lambda: paused(second.sender_id))
        assert not await paused(first.sender_id)
        await eventually(lambda: screen.shows("paused second@x.org"))
        screen.type("r")
        await eventually(resumed)
        screen.type("e")
        await eventually(lambda: screen.shows("as soon as a dispatcher is free"))
        screen.type("?")
        await eventually(lambda: screen.shows("show or leave this help"))
        screen.type("?q")
        async with asyncio.timeout(PATIENCE):
            assert await screen.process.wait() == 0
        # The main screen, the cursor and the terminal settings are restored.
        await eventually(lambda: screen.shows("\x1b[?1049l") and screen.shows("\x1b[?25h"))
        assert termios.tcgetattr(screen.slave) == before


async def test_top_shows_a_cooldown_with_the_reply_until_a_resume_ends_it(
    scheduler: Scheduler, stats: str, tmp_path: Path
) -> None:
    sender = await scheduler.sender(email="first@x.org")
    await scheduler.schedule(sender)
    cooldowns.begin(scheduler.execute, sender.sender_id)
    async with terminal(environment(scheduler, stats), tmp_path) as screen:
        await eventually(lambda: screen.shows("cooling down: 550 5.4.5 Daily user"))
        await eventually(lambda: screen.shows(", probe in 5"))
        screen.type("e")
        await eventually(lambda: screen.shows("has refused the sender's account since"))
        screen.type("r")
        await eventually(lambda: screen.shows("dispatcher till"))
    assert scheduler.value("SELECT count(*) FROM cooldowns") == 0


async def test_top_without_a_real_terminal_prints_one_document_or_a_clear_error(
    scheduler: Scheduler, stats: str, tmp_path: Path
) -> None:
    sender = await scheduler.sender(email="first@x.org")
    values = environment(scheduler, stats)
    away = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    each = [word for address in away for word in ("--dispatcher", address)]
    refusals = {(): b"needs a terminal", ("-o", "json", "--user", ""): b"--user: is required"}
    for more, refusal in (*refusals.items(), (("-o", "json", *each), b"")):
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *more,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=values,
            cwd=tmp_path,
        )
        out, err = await process.communicate()
        assert process.returncode == bool(refusal), err
        assert refusal in err
    (found,) = json.loads(out)["senders"]
    assert found["sender"]["sender_id"] == sender.sender_id
    assert "waiting_count" in found["stats"]
    troubles = json.loads(out)["troubles"]
    assert troubles == [f"dispatcher {address}: no answer" for address in away]
    async with terminal(values | {"TERM": "dumb"}, tmp_path) as screen:
        async with asyncio.timeout(PATIENCE):
            assert await screen.process.wait() == 1
        await eventually(lambda: screen.shows("TERM is 'dumb'"))


async def test_top_shows_all_dispatchers_if_one_of_them_answers(
    scheduler: Scheduler, stats: str, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    async with ScriptedServer({}) as server:
        settings = settings_of(options(database_url, redis_url, server.url, min_gap="2s"))
        async with running(settings) as one, running(settings) as other:
            await eventually(lambda: scheduler.value("SELECT count(*) FROM dispatchers") == 2)
            # A dispatcher that could not read the settings at once starts again with another id.
            ids = {(await each.status()).dispatcher_id for each in (one, other)}
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                *("-o", "json", "--dispatcher", one.address),
                stdout=asyncio.subprocess.PIPE,
                env=environment(scheduler, stats),
                cwd=tmp_path,
            )
            out, _ = await process.communicate()
    found = json.loads(out)
    shown = [each["dispatcher_id"] for each in found["dispatchers"]]
    assert (len(shown), set(shown), found["troubles"]) == (2, ids, [])


async def test_top_pages_through_more_senders_than_fit(
    scheduler: Scheduler, stats: str, tmp_path: Path
) -> None:
    for n in range(30):
        await scheduler.sender(email=f"s{n}@x.org")
    async with terminal(environment(scheduler, stats), tmp_path) as screen:
        await eventually(lambda: screen.shows("s29@x.org"))
        assert not screen.shows("page 1")
        thirtieth = await scheduler.sender(email="s30@x.org")
        await eventually(lambda: screen.shows("page 1   n: next"))
        assert not screen.shows("s30@x.org")
        screen.type("\x1b[6~")
        await eventually(lambda: screen.shows("s30@x.org"))
        await eventually(lambda: screen.shows("page 2   b: back"))
        screen.type("p")
        await eventually(lambda: screen.shows("paused s30@x.org"))
        found = await scheduler.senders.GetSender(GetSenderRequest(sender_id=thirtieth.sender_id))
        assert found.state == SENDER_STATE_PAUSED
        screen.seen.clear()
        screen.type("b")
        await eventually(lambda: screen.shows("s29@x.org"))
