"""Another wall clock for a process, by libfaketime: Debian's package faketime."""

from __future__ import annotations

from pathlib import Path
from typing import Final

HOW_TO_GET: Final = "libfaketime is missing: apt-get install faketime"
# A file is looked at again after so many seconds of the process's time.
_CACHE_S: Final = 1


def faketime_library() -> Path | None:
    """Return the library that a process must load first; None: it is not installed."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    return found[0] if found else None


def clock_off_by(library: Path, offset_s: float) -> dict[str, str]:
    """Return the environment of a process whose wall clock is ahead (behind: below 0) for ever."""
    return _environment(library) | {"FAKETIME": f"{offset_s:+g}s"}


def clock_by_file(library: Path, file: Path) -> dict[str, str]:
    """Return the environment of a process whose wall clock does what `file` says: `set_clock`."""
    return _environment(library) | {
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_CACHE_DURATION": str(_CACHE_S),
    }


def set_clock(file: Path, offset_s: float) -> None:
    """Step a clock of `clock_by_file`, within a second: ahead by so much, behind if below 0."""
    written = file.with_suffix(".new")
    written.write_text(f"{offset_s:+g}s\n")
    written.replace(file)


def _environment(library: Path) -> dict[str, str]:
    # The wall clock alone: the monotonic one counts from the start of the machine.
    return {"LD_PRELOAD": str(library), "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
