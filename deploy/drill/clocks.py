"""Gives processes another wall clock, with libfaketime (Debian: package faketime)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

HOW_TO_GET: Final = "libfaketime is missing: apt-get install faketime"
# The process reads the file again after this time, in seconds.
_CACHE_S: Final = 1


def faketime_library() -> Path | None:
    """Return the library that a process must preload; None if it is not installed."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    return found[0] if found else None


def clock_off_by(library: Path, offset_s: float) -> dict[str, str]:
    """Return the environment of a process whose wall clock is always ahead (behind if below 0)."""
    return _environment(library) | {"FAKETIME": f"{offset_s:+g}s"}


def clock_by_file(library: Path, file: Path) -> dict[str, str]:
    """Return the environment of a process whose wall clock follows `file` (see `set_clock`)."""
    return _environment(library) | {
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_CACHE_DURATION": str(_CACHE_S),
    }


def set_clock(file: Path, offset_s: float) -> None:
    """Step a clock of `clock_by_file`, within a second: ahead by `offset_s`, behind if below 0."""
    written = file.with_suffix(".new")
    written.write_text(f"{offset_s:+g}s\n")
    written.replace(file)


def _environment(library: Path) -> dict[str, str]:
    # Only the wall clock: the monotonic clock counts from the start of the machine.
    return {"LD_PRELOAD": str(library), "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
