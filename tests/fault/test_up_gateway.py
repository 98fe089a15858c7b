"""`outbox up --gateway`: the printed commands, the curl lines of docs/moving.md, Envoy killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest_asyncio

from tests.eventually import PATIENCE, eventually
from tests.fault.test_up import RunningUp, new_folder, pasted, running
from tests.processes import descendants, pid_of
from tests.scraping import scrape

PAGE = Path(__file__).parents[2] / "docs" / "moving.md"
# The path and the verb of every call of the replaced service.
OLD_CALLS = {
    "GET /api/senders",
    "POST /api/senders",
    "GET /api/senders/:id",
    "PATCH /api/senders/:id",
    "DELETE /api/senders/:id",
    "POST /api/email-jobs/schedule",
    "GET /api/email-jobs?senderId=&status=",
    "GET /api/email-jobs/:id",
    "DELETE /api/email-jobs/:id",
    "GET /api/stats?senderId=",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up() -> AsyncIterator[RunningUp]:
    """`outbox up` with the most parts, for several tests, each with its own user."""
    with new_folder() as path:
        async with running(path, "--gateway", "--dispatchers", "2", "--metrics") as one:
            yield one


def commands() -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line]


def run_line(folder: Path, command: str) -> list[Any]:
    """Run a line of the page in a shell; return the JSON documents that it prints.

    A line that sets a variable also sets it for the lines after it.
    """
    name, _, value = command.partition("=$(")
    if value:
        command = f"{command}\necho {name}=${name} >> .outbox/env"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f". .outbox/env\n{command}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_call_of_the_replaced_service_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"^Before: `([^`]+)`", text, re.MULTILINE)) == OLD_CALLS


async def test_the_commands_that_up_prints_run_as_printed(up: RunningUp) -> None:
    printed = (up.folder / "stdout").read_text()
    lines = [line for line in printed.splitlines() if line.startswith("  ")]
    assert len(up.endpoints["dispatchers"]) == 2
    assert len(lines) == 5
    urls = list(up.endpoints["metrics"].values())
    assert len(set(urls)) == 4
    assert all(url in printed for url in urls)
    scrapes = [await scrape(urlsplit(url).netloc) for url in urls]
    serving = [dict(labels) for found in scrapes for labels in found.all("outbox_serving")]
    names = [labels["service"] for labels in serving]
    assert sorted(names) == ["dispatcher", "dispatcher", "scheduler", "stats"]
    shown = pasted(up.folder, lines)
    assert "outbox.v1.BatchService" in shown
    assert "ben@example.com" in shown
    sent_to = ["ann@example.com", "ben@example.com"]
    await eventually(lambda: sorted(mail.rcpt_tos[0] for mail in up.mails()) == sent_to)
    drained = up.ask("dispatcher", "drain", "--server", up.endpoints["dispatchers"][1])
    assert drained["status"]["state"] == "DISPATCHER_STATE_DRAINING"


async def test_the_curl_lines_for_the_old_calls_run_as_printed(up: RunningUp) -> None:
    assert up.endpoints["gateway"].startswith("http://127.0.0.1:")
    answers: dict[str, list[Any]] = {}
    for command in commands():
        answers[command] = run_line(up.folder, command)
        assert not any("code" in answer for answer in answers[command]), answers[command]

    def answer_to(part: str) -> Any:
        ((last),) = [found[-1] for command, found in answers.items() if part in command]
        return last

    assert answer_to('-d \'{"email": ')["min_gap"] == "3s"
    assert answer_to("page_size=50")["senders"][0]["hourly_limit"] == 100
    assert answer_to('"hourly_limit": 200')["hourly_limit"] == 200
    assert "min_gap" not in answer_to("update_mask")
    batch = answer_to("batches:uploadFile")["batch"]
    assert (batch["accepted_count"], batch["rejected_count"]) == ("2", "1")
    assert batch["subject"] == "Hello {{ name }}"
    assert len(answer_to("state=")["email_jobs"]) == 3
    assert answer_to("jobs/$JOB:explain")["wait_reason"] == "WAIT_REASON_NOT_DUE"
    assert answer_to('DELETE "$GATEWAY/api/email-jobs/$JOB')["state"].endswith("_CANCELLED")
    assert answer_to("batches/$BATCH:cancel")["cancelled_count"] == "1"
    assert answer_to("batches/$BATCH:watch")["done"]
    assert answer_to("stats?senderId=$SENDER")["counts"]["cancelled_count"] == "2"
    assert answer_to("suppressions:importFile")["created_count"] == "1"


async def test_a_gateway_that_is_killed_is_started_again_on_its_port(up: RunningUp) -> None:
    url = up.endpoints["gateway"]
    assert f"GATEWAY={url}\n" in (up.folder / ".outbox/env").read_text()
    assert f"gateway     {url}, try the API: {url}/docs" in (up.folder / "stdout").read_text()
    config = str(up.folder / ".outbox/gateway/envoy.json")
    before = pid_of(config, descendants(up.process.pid))
    os.kill(before, signal.SIGKILL)
    await eventually(lambda: "the gateway is running again" in up.errors)
    assert "the gateway was ended by SIGKILL; starting it again" in up.errors
    assert pid_of(config, descendants(up.process.pid)) != before
    assert up.endpoints["gateway"] == url
    page = subprocess.run(["curl", "-sf", f"{url}/docs"], capture_output=True, check=True)  # noqa: ASYNC221 - quick
    assert b"Outbox API" in page.stdout
