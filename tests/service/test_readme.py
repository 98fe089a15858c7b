"""What the README prints is what a new user types: it is run here, letter by letter."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from shared.settings import Settings, format_duration
from tests.eventually import eventually

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEFAULT_PORTS = {"scheduler": "50051", "dispatcher": "50052", "stats": "50053"}


def commands(section: str) -> list[str]:
    """Return the commands of the block that follows `<!-- tour: section -->`."""
    found = re.search(rf"<!-- tour: {section} -->\n```sh\n(.*?)```", README, re.DOTALL)
    assert found, section
    return found.group(1).splitlines()


def shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, timedelta):
        return format_duration(value)
    if isinstance(value, tuple):
        return ",".join(format_duration(part) for part in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_every_setting_is_listed_with_its_default_and_meaning() -> None:
    for name, field in Settings.model_fields.items():
        default = shown(field.default)
        cell = f"`{default}`" if default else "empty"
        assert f"| `OUTBOX_{name.upper()}` | {cell} | {field.description} |" in README


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder like a clone after `make setup`, with `outbox up` running in it."""
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    (tmp_path / "client").symlink_to(ROOT / "client")
    installed = shutil.ignore_patterns("node_modules")
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=installed)
    (line,) = commands("up")
    with (tmp_path / "up.log").open("wb") as log:
        up = subprocess.Popen(line.split(), cwd=tmp_path, stdout=log, stderr=log)
        try:
            asyncio.run(
                eventually(
                    lambda: (
                        up.poll() is not None
                        or "ready after" in (tmp_path / "up.log").read_text(encoding="utf-8")
                    ),
                    deadline=60,
                )
            )
            yield tmp_path
        finally:
            up.send_signal(signal.SIGINT)
            assert up.wait(30) == 0, (tmp_path / "up.log").read_text(encoding="utf-8")


def test_the_tour_runs_as_printed(folder: Path) -> None:
    log = (folder / "up.log").read_text(encoding="utf-8")
    ports = dict(
        re.findall(r"^(scheduler|dispatcher|stats) +127\.0\.0\.1:(\d+)$", log, re.MULTILINE)
    )
    assert ports.keys() == DEFAULT_PORTS.keys(), log

    outputs: dict[str, str] = {}
    for command in commands("command line") + commands("grpc") + commands("examples"):
        here = command
        # `up` takes other ports where these are taken, and says so.
        for service, port in DEFAULT_PORTS.items():
            here = here.replace(f"127.0.0.1:{port}", f"127.0.0.1:{ports[service]}")
        done = subprocess.run(
            ["/bin/bash", "-ec", here],
            cwd=folder,
            capture_output=True,
            check=False,
            text=True,
            timeout=120,  # npm fetches over the network
        )
        assert done.returncode == 0, f"{here}\n{done.stdout}\n{done.stderr}"
        outputs[command] = done.stdout

    for command in commands("examples"):
        assert "accepted 2" in outputs[command]
        assert "sent 2" in outputs[command]
    jobs = next(out for command, out in outputs.items() if "jobs list" in command)
    assert jobs.count("SENT") == 2
    services = next(out for command, out in outputs.items() if command.endswith(" list"))
    assert "outbox.v1.BatchService" in services
    batch = next(out for command, out in outputs.items() if "ScheduleBatch" in command)
    assert json.loads(batch)["batch"]["accepted_count"] == "1"
    health = next(out for command, out in outputs.items() if "Health/Check" in command)
    assert json.loads(health)["status"] == "SERVING"
