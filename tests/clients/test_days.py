"""Clients in Go, Node and Java, made from protos/ alone, do a realistic day on a real stack.

`make test-clients` builds them first. Each prints a line per step; what it must have seen is below.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from tests.eventually import PATIENCE, eventually
from tests.fault.test_up import RunningUp, new_folder, running
from tests.processes import descendants, pid_of

ROOT: Final = Path(__file__).parents[2]
BUILT: Final = ROOT / "build" / "clients"
CONFIG: Final = ROOT / "protos" / "outbox" / "v1" / "service_config.json"
PROGRAMS: Final = {
    "go": [str(BUILT / "go" / "day")],
    "java": [str(BUILT / "java" / "day")],
    "node": ["node", str(ROOT / "tests" / "clients" / "node" / "day.js")],
}
SEEN: Final = [
    "sender is the same: true",
    "refused: ADDRESS_INVALID sender.email sender.hourly_limit",
    "refused: TEMPLATE_INVALID options.subject",
    "accepted: 5",
    "restart",
    "read after the restart: {user}@example.com",
    "watched: sent 5, resumed true",
    "listed: 5 in 3 pages",
    "accepted: 3",
    "cancelled: EMAIL_JOB_STATE_CANCELLED, then 2",
    "refused: TOO_LATE_TO_CANCEL state=SENT",
    "deadline exceeded: true",
    "done",
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up() -> AsyncIterator[RunningUp]:
    with new_folder() as folder:
        async with running(folder) as one:
            yield one


@pytest.mark.parametrize("language", PROGRAMS)
async def test_a_client_in_another_language_makes_a_days_calls(
    up: RunningUp, language: str, tmp_path: Path
) -> None:
    # As published, but for the limit of a call: a busy machine restarts the scheduler slowly.
    config = tmp_path / "service_config.json"
    config.write_text(CONFIG.read_text(encoding="utf-8").replace('"30s"', f'"{PATIENCE:g}s"'))
    # Before 1.40, grpc-go retries only with this variable.
    process = await asyncio.create_subprocess_exec(
        *PROGRAMS[language], up.endpoints["scheduler"], str(config),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE, env=os.environ | {"GRPC_GO_RETRY": "on"},
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    assert process.stderr
    seen: list[str] = []
    async with asyncio.timeout(PATIENCE):
        while line := (await process.stdout.readline()).decode().rstrip("\n"):
            seen.append(line)
            if line == "restart":
                await kill_the_scheduler(up)
                process.stdin.write(b"killed\n")
        errors = (await process.stderr.read()).decode()
        assert (await process.wait(), errors) == (0, ""), seen
    assert seen == [line.format(user=language) for line in SEEN]
    mails = [mail for mail in up.mails() if mail.mail_from == f"{language}@example.com"]
    assert len(mails) == 5


async def kill_the_scheduler(up: RunningUp) -> None:
    """Kill the scheduler. `outbox up` starts it again at its address."""
    killed = pid_of("outbox_server.services.scheduler", descendants(up.process.pid))
    os.kill(killed, signal.SIGKILL)
    await eventually(lambda: killed not in descendants(up.process.pid))


async def test_the_go_example_runs(up: RunningUp) -> None:
    process = await asyncio.create_subprocess_exec(
        str(BUILT / "go" / "example"), up.endpoints["scheduler"], stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(PATIENCE):
        said, _ = await process.communicate()
    assert said.decode().splitlines() == ["accepted 2, rejected 0", "sent 2"]
