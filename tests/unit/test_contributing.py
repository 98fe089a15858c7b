"""The lists in CONTRIBUTING.md name files that exist, and name all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LISTS = dict(re.findall(r"<!-- files: (\w+) -->\n((?:.+\n)+)", PAGE))
# A path of this repository: it contains a slash or has a known file extension.
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:md|toml|lock|py))`")
# An earlier change of each kind: its names in the code, and the folders to search.
EXAMPLES = {
    "limit": (r"max_in_flight|MAX_IN_FLIGHT", ("protos", "services", "shared", "cli")),
    "state": (r"JobState\.EXPIRED|\bexpired_count\b", ("services/scheduler", "shared", "cli")),
    "setting": (r"\buncertain_policy\b", ("shared", "tests/unit/test_settings.py")),
    "fault": (r"\bredis_full\b", ("deploy", "docs")),
    "alert": (r"OutboxRebuildLoop", ("deploy", "docs", "tests/firing_alerts.py")),
    "quota": (r"stored_rejection", ("protos/outbox/v1/user.proto", "services", "shared", "cli")),
}


def files_of(kind: str) -> set[str]:
    return {path for path in PATH.findall(LISTS[kind]) if (ROOT / path).is_file()}


def test_every_path_on_the_page_exists() -> None:
    paths = set(PATH.findall(PAGE)) | set(re.findall(r"\]\(([^)]+)\)", PAGE))
    assert len(paths) > 50
    sources = {path for path in paths if not path.startswith("build/")}
    assert {path for path in sources if not (ROOT / path).exists()} == set()


def test_the_page_says_what_each_folder_of_services_and_shared_has() -> None:
    rows = set(re.findall(r"(?m)^\| `((?:services|shared)/\w+/)` \| .{10}", PAGE))
    assert rows == {
        f"{parent}/{folder.name}/"
        for parent in ("services", "shared")
        for folder in (ROOT / parent).iterdir()
        if (folder / "__init__.py").is_file()
    }


def test_the_page_has_a_list_for_each_kind_of_change() -> None:
    assert LISTS.keys() == {
        *("limit", "state", "method", "setting", "metric", "alert"),
        *("quota", "reason", "migration", "fault"),
    }
    for kind, text in LISTS.items():
        numbers = [int(number) for number in re.findall(r"(?m)^(\d+)\. ", text)]
        assert numbers == list(range(1, len(numbers) + 1)), kind


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_list_has_every_file_that_an_earlier_change_of_its_kind_touched(kind: str) -> None:
    name, folders = EXAMPLES[kind]
    touched = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder, *(ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".lua", ".proto", ".md", ".yml")
        and "versions" not in path.parts  # a migration is a new file
        and re.search(name, path.read_text(encoding="utf-8"))
    }
    assert touched
    assert touched <= files_of(kind)
