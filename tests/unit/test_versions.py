"""Every file that states the version states the version of pyproject.toml."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from release.revisions import record, released_revisions
from release.versions import mismatches, project_version, write

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree of version 2.0.0, whose other files still state 1.9.9."""
    files = {
        "pyproject.toml": '[project]\nversion = "2.0.0"\n',
        "client/pyproject.toml": '[project]\nname = "outbox-client"\nversion = "1.9.9"\n',
        "deploy/chart/outbox/Chart.yaml": 'apiVersion: v2\nversion: 1.9.9\nappVersion: "1.9.9"\n',
        "deploy/image/Dockerfile": "# docker build --tag outbox:1.9.9 .\nARG VERSION=1.9.9\n",
        ".ci/released-revisions": "# Releases\n1.9.9 0004\n",
        "shared/database/migrations/versions/0004_a.py": "",
        "shared/database/migrations/versions/0007_b.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_all_versions_agree() -> None:
    assert mismatches() == []
    for name in ("outbox", "outbox-client"):
        assert importlib.metadata.version(name) == project_version()
    assert project_version() in released_revisions()


def test_every_other_version_is_found_and_written(tree: Path) -> None:
    found = mismatches(tree)
    assert len(found) == 5
    assert found[0] == (
        "client/pyproject.toml says 'version = \"1.9.9\"', and pyproject.toml '2.0.0'"
    )
    write(tree)
    assert mismatches(tree) == []
    chart = (tree / "deploy/chart/outbox/Chart.yaml").read_text(encoding="utf-8")
    assert chart == 'apiVersion: v2\nversion: 2.0.0\nappVersion: "2.0.0"\n'


def test_the_revision_of_a_release_is_recorded_beside_the_earlier_ones(tree: Path) -> None:
    record(tree)
    text = (tree / ".ci/released-revisions").read_text(encoding="utf-8")
    assert text == "# Releases\n1.9.9 0004\n2.0.0 0007\n"
