"""The schema revisions of releases. `python -m release.revisions` records the present one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from release.versions import ROOT, project_version

_FILE: Final = Path(".ci") / "released-revisions"
_VERSIONS: Final = Path("shared") / "database" / "migrations" / "versions"


def released_revisions(root: Path = ROOT) -> dict[str, str]:
    """Return the revision of each released version, in the order of the releases."""
    found = {}
    for line in (root / _FILE).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            version, revision = line.split()
            found[version] = revision
    return found


def all_revisions(root: Path = ROOT) -> list[str]:
    """Return the revisions that this source tree has, in their order."""
    return sorted(path.name.partition("_")[0] for path in (root / _VERSIONS).glob("[0-9]*.py"))


def record(root: Path = ROOT) -> None:
    """Record the last revision for the version in pyproject.toml."""
    found = released_revisions(root) | {project_version(root): all_revisions(root)[-1]}
    path = root / _FILE
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    lines = [*comments, *(f"{version} {revision}" for version, revision in found.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
    sys.stdout.write(f"{_FILE}: {project_version()} {released_revisions()[project_version()]}\n")
