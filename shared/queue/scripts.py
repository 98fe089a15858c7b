"""Loads the Lua scripts of this package, with their includes resolved."""

from __future__ import annotations

import re
from importlib.resources import files

_INCLUDE = re.compile(r"^--!include (\w+)$", re.MULTILINE)


def read_script(name: str, replace: dict[str, str] | None = None) -> str:
    """Return the source of `lua/<name>.lua` with every include in its place.

    `replace` gives another text for an include: tests set the time by it.
    """
    folder = files(__package__).joinpath("lua")
    includes = replace or {}

    def include(match: re.Match[str]) -> str:
        wanted = match.group(1)
        if wanted in includes:
            return includes[wanted]
        return folder.joinpath("includes", f"{wanted}.lua").read_text(encoding="utf-8")

    return _INCLUDE.sub(include, folder.joinpath(f"{name}.lua").read_text(encoding="utf-8"))
