"""Loads the Lua scripts of this package, with their includes resolved."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

SCRIPTS = (
    "claim",
    "confirm",
    "renew",
    "circuits",
    "settle",
    "begin_load",
    "load_head",
    "add_jobs",
    "load_user",
    "find_lost",
    "find_outdated",
    "forget",
    "begin_rebuild",
    "keep_rebuild",
    "finish_rebuild",
    "begin_life",
    "read_life",
    "begin_patrol",
    "end_patrol",
    "limiter",
    "backlog",
    "upcoming",
    "serves",
)
_INCLUDE = re.compile(r"^--!include (\w+)$", re.MULTILINE)


def read_script(name: str, replace: Mapping[str, str] | None = None) -> str:
    """Return the source of `lua/<name>.lua` with its includes inserted.

    `replace` has other texts for includes: tests use it to set the time. The files of a script are
    read once in a process, which has a queue for each shard.
    """
    return _resolve(name, tuple(sorted((replace or {}).items())))


@cache
def _resolve(name: str, replace: tuple[tuple[str, str], ...]) -> str:
    folder = files(__package__).joinpath("lua")
    includes = dict(replace)

    def include(match: re.Match[str]) -> str:
        wanted = match.group(1)
        if wanted in includes:
            return includes[wanted]
        text = folder.joinpath("includes", f"{wanted}.lua").read_text(encoding="utf-8")
        return _INCLUDE.sub(include, text)

    return _INCLUDE.sub(include, folder.joinpath(f"{name}.lua").read_text(encoding="utf-8"))


def write_scripts(folder: Path) -> None:
    """Write every script, as Redis gets it, into `folder`, for a linter that has no includes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SCRIPTS:
        folder.joinpath(f"{name}.lua").write_text(read_script(name), encoding="utf-8")


if __name__ == "__main__":
    write_scripts(Path(sys.argv[1]))
