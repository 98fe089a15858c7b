"""The protos build without other files, and changes of the released contract are reported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RELEASED = ROOT / ".ci" / "released-contract.binpb"
BUF = Path(sys.executable).parent / "buf"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of protos/ in an otherwise empty folder."""
    return Path(shutil.copytree(ROOT / "protos", tmp_path / "protos"))


def run(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, check=False, text=True, timeout=60)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_protoc_builds_the_folder_without_other_protos(copied: Path) -> None:
    # grpc_tools' protoc includes google/protobuf, as every protoc does, but not google/api.
    protoc = (sys.executable, "-m", "grpc_tools.protoc", "-I", copied)
    sources = sorted(copied.rglob("*.proto"))
    run(*protoc, "--descriptor_set_out=contract.binpb", *sources, cwd=copied.parent)


def test_buf_builds_the_folder_without_other_protos(copied: Path) -> None:
    run(BUF, "build", cwd=copied)


def test_lint_refuses_to_rename_a_released_field(copied: Path) -> None:
    shutil.copy(ROOT / "buf.yaml", copied.parent)
    proto = copied / "outbox" / "v1" / "batch.proto"
    compare = (BUF, "breaking", "--against", RELEASED)
    run(*compare, cwd=copied.parent)
    proto.write_text(proto.read_text().replace(" schedule_time = 7", " start_time = 7"))
    done = subprocess.run(compare, cwd=copied.parent, capture_output=True, check=False, timeout=60)
    assert done.returncode == 100  # the exit code of buf for findings
    assert b"BatchOptions" in done.stdout
