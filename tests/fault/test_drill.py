"""`outbox drill` as a process: its output and its leftovers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run
from tests.eventually import PATIENCE, eventually
from tests.processes import alive, descendants

OUTBOX = Path(sys.executable).with_name("outbox")


@pytest.fixture
def folder() -> Iterator[Path]:
    """The parent folder of drills. Not pytest's own folder, which only its owner may enter."""
    path = Path(tempfile.mkdtemp(prefix="outbox-drills-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def left_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    return subprocess.Popen(
        [OUTBOX, "drill", *words],
        env=kept | {"TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_short_drill_keeps_every_promise_and_leaves_nothing(folder: Path) -> None:
    drill = start(
        folder,
        *("--minutes", "0.12", "--seed", "1", "--faults", "redis_flush,dispatcher_kill"),
        *("--dispatchers", "1", "--policy", "hold", "-o", "json"),
    )
    out, err = drill.communicate(timeout=PATIENCE)
    assert drill.returncode == 0, err
    document: dict[str, Any] = json.loads(out)
    assert document["broken"] == []
    assert document["faults"] == {"dispatcher_kill": 1, "redis_flush": 1}
    assert set(document["recovery_s"]) == {"dispatcher_kill", "redis_flush"}
    assert document["sent"] > 40
    ended = ("sent", "failed", "uncertain", "cancelled")
    assert document["accepted"] == sum(document[name] for name in ended)
    for name in ("lost", "duplicates", "overshoot", "stats_mismatch", "open", "failed"):
        assert document[name] == 0, name
    assert document["least_gap_s"] >= 0.2
    assert document["most_in_window"] > 0
    assert "dispatcher_kill" in err
    assert left_in(folder) == []


async def test_an_interrupted_drill_leaves_neither_processes_nor_files(folder: Path) -> None:
    # A paused process is also resumed or killed.
    drill = start(folder, "--minutes", "5", "--dispatchers", "1", "--faults", "dispatcher_pause")
    assert drill.stderr is not None
    while "SIGSTOP" not in (line := drill.stderr.readline()):
        assert line, "it ended before its first fault"
    started = descendants(drill.pid)
    assert len(started) >= 5
    drill.send_signal(signal.SIGINT)
    await eventually(lambda: drill.poll() is not None)
    assert drill.wait() == 1
    assert "interrupted" in drill.stderr.read()
    await eventually(lambda: not any(map(alive, started)))
    assert left_in(folder) == []
    for pipe in (drill.stdout, drill.stderr):
        assert pipe is not None
        pipe.close()


def test_an_unknown_fault_is_refused_before_anything_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    refused = run(["drill", "--faults", "redis_flush,earthquake"])
    assert refused.exit_code == 2
    assert "earthquake" in refused.stderr
    assert left_in(folder) == []
