"""`make release` on fresh clones: its results, that two builds are equal, and its refusals."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from release.dependencies import OURS, production_distributions
from release.versions import project_version

ROOT = Path(__file__).parents[2]
VERSION = project_version()
CHART = """apiVersion: v2
name: outbox
description: A chart
version: {version}
appVersion: {version}
"""


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.com")
    done = subprocess.run(
        ["git", *identity, *words],
        cwd=folder,
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def clone_to(folder: Path) -> Path:
    """Clone this repository and commit the state of its work tree."""
    git(folder.parent, "clone", "--quiet", "--depth", "1", ROOT.as_uri(), folder.name)
    names = git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    for name in filter(None, names):
        source, target = ROOT / name, folder / name
        target.unlink(missing_ok=True)
        if source.is_symlink() or source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                target.symlink_to(source.readlink())
            else:
                target.write_bytes(source.read_bytes())
    chart = folder / "deploy" / "chart" / "outbox" / "Chart.yaml"
    if not chart.exists():
        chart.parent.mkdir(parents=True)
        chart.write_text(CHART.format(version=VERSION), encoding="utf-8")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all", "--allow-empty")
    return folder


def release(folder: Path) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    return subprocess.run(
        [sys.executable, "-m", "release"],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(folder)},
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def clones(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two clones of one commit, each with its release built."""
    first = clone_to(tmp_path_factory.mktemp("first") / "outbox")
    second = tmp_path_factory.mktemp("second") / "elsewhere"
    git(second.parent, "clone", "--quiet", first.as_uri(), second.name)
    with ThreadPoolExecutor() as pool:
        for done in pool.map(release, (first, second)):
            assert done.returncode == 0, done.stderr
    return [first, second]


def test_a_release_has_all_parts_with_their_checksums(clones: list[Path]) -> None:
    built = clones[0] / "build" / "release"
    names = {path.name for path in built.iterdir()}
    assert names == {
        f"outbox-{VERSION}-py3-none-any.whl",
        f"outbox-{VERSION}-source.tar.gz",
        f"outbox-{VERSION}-requirements.txt",
        f"outbox-{VERSION}-licenses.md",
        f"outbox-{VERSION}-sbom.cdx.json",
        f"outbox-{VERSION}.tgz",
        f"outbox_client-{VERSION}-py3-none-any.whl",
        f"outbox_client-{VERSION}.tar.gz",
        "SHA256SUMS",
    }
    for line in (built / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, name = line.split()
        assert hashlib.sha256((built / name).read_bytes()).hexdigest() == digest
        names.discard(name)
    assert names == {"SHA256SUMS"}
    wheel = zipfile.ZipFile(built / f"outbox-{VERSION}-py3-none-any.whl")
    assert "outbox_server/shared/database/migrations/env.py" in wheel.namelist()
    client = zipfile.ZipFile(built / f"outbox_client-{VERSION}-py3-none-any.whl")
    assert "outbox/v1/outbox.binpb" in client.namelist()
    with tarfile.open(built / f"outbox-{VERSION}.tgz") as chart:
        assert "outbox/Chart.yaml" in chart.getnames()
    with tarfile.open(built / f"outbox-{VERSION}-source.tar.gz") as source:
        assert f"outbox-{VERSION}/requirements.lock" in source.getnames()


def test_two_builds_of_a_commit_are_equal(clones: list[Path]) -> None:
    first, second = (
        (clone / "build" / "release" / "SHA256SUMS").read_text(encoding="utf-8") for clone in clones
    )
    assert first == second


def test_the_bill_of_materials_has_every_production_dependency_and_no_path(
    clones: list[Path],
) -> None:
    built = clones[0] / "build" / "release"
    text = (built / f"outbox-{VERSION}-sbom.cdx.json").read_text(encoding="utf-8")
    document = json.loads(text)
    found = {canonicalize_name(one["name"]): one for one in document["components"]}
    assert set(found) == set(production_distributions()) - {"outbox"}
    assert document["metadata"]["component"]["name"] == "outbox"
    for name, component in found.items():
        if name not in OURS:
            assert component["purl"] == f"pkg:pypi/{name}@{component['version']}"
            assert component["licenses"]
    assert str(ROOT) not in text
    assert "file:" not in text


def test_a_tree_with_changes_is_refused(clones: list[Path]) -> None:
    stray = clones[1] / "stray.txt"
    stray.touch()
    try:
        done = release(clones[1])
    finally:
        stray.unlink()
    assert done.returncode == 1
    assert "no release: the work tree has changes, such as '?? stray.txt'" in done.stderr


def test_versions_that_differ_are_refused(clones: list[Path]) -> None:
    path = clones[1] / "client" / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r'(?m)^version = ".*"', 'version = "9.9.9"', text), encoding="utf-8")
    git(clones[1], "commit", "--quiet", "--all", "--message", "a version")
    done = release(clones[1])
    assert done.returncode == 1
    assert f"client/pyproject.toml says 'version = \"9.9.9\"', and pyproject.toml '{VERSION}'" in (
        done.stderr
    )
