"""The documentation matches the code: every error reason, every method."""

from __future__ import annotations

import re
from pathlib import Path

from docs.build_api_reference import build
from outbox_server.deploy.drill.plan import KINDS

ROOT = Path(__file__).parent.parent.parent
# The places of an error reason: by name, or as the first argument of a row's problem.
_REASON = re.compile(
    r'(?:reason(?:: str)? ?= ?|_reason = |, |\(\s*)"([A-Z][A-Z0-9]+(?:_[A-Z0-9]+)+)"'
)
# Upper-case words in the same places that are not error reasons; callers never see the last two.
_OTHERS = {
    "COMMAND_FAILED",
    "LIFE_SUPERSEDED",
    "MIGRATION_BLOCKED",
    "SCHEMA_OLDER",
    "SETTINGS_UNKNOWN",
}


def reasons_in_code() -> set[str]:
    found: set[str] = set()
    for folder in ("services", "shared"):
        for path in (ROOT / folder).rglob("*.py"):
            if "pb" not in path.parts:
                found |= set(_REASON.findall(path.read_text(encoding="utf-8")))
    return found - _OTHERS


def test_every_error_reason_is_documented() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    missing = {reason for reason in reasons_in_code() if f"`{reason}`" not in page}
    assert not missing, "docs/errors.md says nothing of these"


def test_every_documented_error_reason_is_used() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("services", "shared", "protos")
        for suffix in ("*.py", "*.proto")
        for path in (ROOT / folder).rglob(suffix)
    )
    # Reasons are in the first column.
    named = {
        reason
        for line in page.splitlines()
        if line.startswith("| `")
        for reason in re.findall(r"`([A-Z0-9_]+)`", line.split("|")[1])
    }
    assert named
    unknown = {
        reason
        for reason in named
        if reason not in code and not reason.endswith(("_NOT_FOUND", "_REQUIRED"))
    }
    assert not unknown


def test_the_api_reference_has_every_method_and_its_comment() -> None:
    page = build()
    protos = list((ROOT / "protos" / "outbox" / "v1").glob("*_service.proto"))
    methods = [
        name
        for path in protos
        for name in re.findall(r"rpc (\w+)\(", path.read_text(encoding="utf-8"))
    ]
    assert len(methods) > 30
    for name in methods:
        assert f"### {name}\n\n" in page
    assert "\n\n\n\n" not in page, "something has no comment"


def test_every_test_and_file_named_in_reliability_md_exists() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    code, named = "", 0
    # The name of a test follows a link to its file.
    for file, test in re.findall(r"\]\(([^)#]+)\)|`(test_\w+)`", page):
        if test:
            named += 1
            assert re.search(rf"def {test}\(", code), f"{test} is not where the page says"
        else:
            path = ROOT / "docs" / file
            assert path.exists(), f"there is no {file}"
            code = path.read_text(encoding="utf-8")
    assert named > 50


def test_reliability_md_has_every_promise_and_every_fault() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    promises = re.findall(r"(?m)^\| (\d+) [A-Z]", page.partition("## Each promise")[2])
    assert [*map(str, range(1, 13))] == promises[:12]
    faults = re.findall(r"(?m)^\| `(\w+)` \|", page.partition("### What it found")[0])
    assert faults == list(KINDS)
