"""The releases and the revisions of their schemas, as `make release-revision` recorded them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

FILE: Final = Path(__file__).parents[1] / ".ci" / "released-revisions"
FOLDER: Final = Path(__file__).parents[1] / "shared" / "database" / "migrations" / "versions"


def read(text: str) -> dict[str, str]:
    """Return the revision of each version, in the order of the releases."""
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return {line[0]: line[1] for line in lines}


RELEASED: Final = read(FILE.read_text(encoding="utf-8"))
# The schema of the last release.
LAST_RELEASED: Final = list(RELEASED.values())[-1]
REVISIONS: Final = sorted(path.name.partition("_")[0] for path in FOLDER.glob("[0-9]*.py"))
