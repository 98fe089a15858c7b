"""The production dependencies: what a server with its command line needs, and nothing else.

`python -m release.dependencies` prints their part of requirements.lock.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# The image has the services and the `outbox` command. The embedded stack, the gateway and what
# developers need are other extras.
ROOT: Final = ("outbox", frozenset({"cli"}))
OURS: Final = frozenset({"outbox", "outbox-client"})
_ENTRY: Final = re.compile(r"(?m)^([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?==(\S+)")


def production_distributions() -> dict[str, Distribution]:
    """Return the installed distributions that production needs, ours included, by name."""
    found: dict[str, Distribution] = {}
    visited: set[tuple[str, frozenset[str]]] = set()
    waiting = [ROOT]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in visited:
            continue
        visited.add((name, extras))
        found[name] = distribution(name)
        for line in found[name].requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in (extras or {""})
            ):
                waiting.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return dict(sorted(found.items()))


def locked_entries(lock: str) -> dict[str, tuple[str, str]]:
    """Return (version, text) of each package in a lock file, by name.

    Raises:
        ValueError: an entry is not an exact version with hashes, so it cannot be verified.
    """
    found: dict[str, tuple[str, str]] = {}
    for entry in re.split(r"(?m)^(?=[^\s#])", lock):
        lines = [line for line in entry.splitlines() if line and not line.lstrip().startswith("#")]
        if not lines:
            continue
        match = _ENTRY.match(lines[0])
        if match is None or "--hash=sha256:" not in entry:
            raise ValueError(f"{lines[0]!r} is not NAME==VERSION with hashes; run make lock")
        found[canonicalize_name(match[1])] = (match[2], "\n".join(lines) + "\n")
    return found


def production_lock(lock: str) -> str:
    """Return the part of the lock file that production needs.

    Raises:
        ValueError: a package is missing in the lock file, or installed in another version.
    """
    entries = locked_entries(lock)
    parts = []
    for name, installed in production_distributions().items():
        if name in OURS:
            continue
        version, text = entries.get(name, ("", ""))
        if version != installed.version:
            raise ValueError(
                f"{name} is installed as {installed.version}, but locked as {version or 'nothing'}"
            )
        parts.append(text)
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(production_lock(Path("requirements.lock").read_text(encoding="utf-8")))
