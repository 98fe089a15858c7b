"""`outbox up --gateway`: every curl line of docs/moving.md, and a kill of Envoy."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.eventually import PATIENCE, eventually
from tests.fault.test_up import folder, running
from tests.processes import descendants, pid_of

__all__ = ["folder"]

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


async def test_the_curl_lines_for_the_old_calls_run_as_printed(folder: Path) -> None:
    async with running(folder, "--gateway") as up:
        assert up.endpoints["gateway"].startswith("http://127.0.0.1:")
        answers: dict[str, list[Any]] = {}
        for command in commands():
            answers[command] = run_line(folder, command)
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


async def test_a_gateway_that_is_killed_is_started_again_on_its_port(folder: Path) -> None:
    async with running(folder, "--gateway") as up:
        url = up.endpoints["gateway"]
        assert f"GATEWAY={url}\n" in (folder / ".outbox/env").read_text()
        assert f"gateway     {url}, try the API: {url}/docs" in (folder / "stdout").read_text()
        config = str(folder / ".outbox/gateway/envoy.json")
        before = pid_of(config, descendants(up.process.pid))
        os.kill(before, signal.SIGKILL)
        await eventually(lambda: "the gateway is running again" in up.errors)
        assert "the gateway was ended by SIGKILL; starting it again" in up.errors
        assert pid_of(config, descendants(up.process.pid)) != before
        assert up.endpoints["gateway"] == url
        page = subprocess.run(["curl", "-sf", f"{url}/docs"], capture_output=True, check=True)  # noqa: ASYNC221 - quick
        assert b"Outbox API" in page.stdout
