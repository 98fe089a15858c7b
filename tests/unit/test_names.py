"""Each class has a unique name, so that a name identifies the class."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
FOLDERS: Final = (
    "services",
    "shared",
    "cli",
    "deploy",
    "bench",
    "release",
    "tests",
    "docs",
    "examples",
    "client/src/outbox_client",
)
# Generated from `_async`: the same classes for callers without asyncio.
GENERATED: Final = "_sync"
# The client raises the same errors as the servers, named after gRPC's status codes.
ERRORS: Final = {"shared/errors.py", "client/src/outbox_client/errors.py"}
# Parsing the whole repository would take most of a second.
CLASS: Final = re.compile(r"^[ \t]*class[ \t]+(\w+)[ \t]*[(:]", re.MULTILINE)


def test_class_names_are_unique() -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if GENERATED in path.parts:
                continue
            for name in CLASS.findall(path.read_text()):
                found[name].append(str(path.relative_to(ROOT)))
    assert len(found) > 400
    several = {
        name: paths for name, paths in found.items() if len(paths) > 1 and set(paths) != ERRORS
    }
    assert several == {}
