"""The one version: pyproject.toml's. Every other file that states a version must agree.

`python -m release.versions` lists the files that differ; with `--write` it changes them.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
# Files by pattern, and what in them states the version. A pattern may match no file.
_PLACES: Final = (
    ("client/pyproject.toml", r'(?m)^version = "([^"]+)"'),
    ("deploy/chart/*/Chart.yaml", r'(?m)^version: "?([^"\s]+)'),
    ("deploy/chart/*/Chart.yaml", r'(?m)^appVersion: "?([^"\s]+)'),
    ("deploy/**/Dockerfile", r"(?m)^ARG VERSION=(\S+)"),
    ("deploy/**/Dockerfile", r"(?m)^#.*--tag outbox:([\w.]+)"),
)


def project_version(root: Path = ROOT) -> str:
    """Return the version in pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    version: str = project["project"]["version"]
    return version


def stated_versions(root: Path = ROOT) -> Iterator[tuple[Path, re.Match[str]]]:
    """Yield every other place that states a version."""
    for pattern, expression in _PLACES:
        for path in sorted(root.glob(pattern)):
            for found in re.finditer(expression, path.read_text(encoding="utf-8")):
                yield path, found


def mismatches(root: Path = ROOT) -> list[str]:
    """Return the places that state another version than pyproject.toml, one per line."""
    version = project_version(root)
    return [
        f"{path.relative_to(root)} says {found[0]!r}, and pyproject.toml {version!r}"
        for path, found in stated_versions(root)
        if found[1] != version
    ]


def write(root: Path = ROOT) -> None:
    """Write the version of pyproject.toml into every other place."""
    version = project_version(root)
    while True:
        wrong = next((each for each in stated_versions(root) if each[1][1] != version), None)
        if wrong is None:
            return
        path, found = wrong
        text = path.read_text(encoding="utf-8")
        path.write_text(text[: found.start(1)] + version + text[found.end(1) :], encoding="utf-8")


def main(arguments: list[str]) -> int:
    """List the mismatches, or remove them."""
    parser = argparse.ArgumentParser(prog="python -m release.versions", description=__doc__)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args(arguments).write:
        write()
    found = mismatches()
    sys.stderr.write("".join(f"{line}\n" for line in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
