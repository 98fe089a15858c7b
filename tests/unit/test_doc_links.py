"""Links, anchors and paths on the documentation pages have targets."""

from __future__ import annotations

import re
from pathlib import Path

from tests.for_each import for_each

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]+))?\)")
_FOLDERS = "protos|services|shared|cli|client|deploy|tests|bench|examples|docs"
_PATH = re.compile(rf"`((?:{_FOLDERS})/[\w./-]*)`")
# Files that make targets write.
_GENERATED = {"docs/api.md", "client/src/outbox/v1/outbox.binpb"}


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    words = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in words}


@for_each(PAGES)
def test_every_link_on_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    for path, anchor in _LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@for_each(PAGES)
def test_every_path_on_a_page_exists(page: Path) -> None:
    paths = set(_PATH.findall(page.read_text(encoding="utf-8"))) - _GENERATED
    assert {path for path in paths if not (ROOT / path).exists()} == set()
