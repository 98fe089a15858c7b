"""Durations as people write them: `250ms`, `2s`, `1h30m`. Pure."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)(ms|s|m|h|d)")
_MILLISECOND: Final = timedelta(milliseconds=1)
_SECOND_MS: Final = 1_000


def parse_duration(text: str) -> timedelta:
    """Return the duration of a text such as `250ms`, `2s`, `1.5h`, `1h30m` or `0`.

    Raises:
        ValueError: the text is not a duration.
    """
    text = text.strip()
    if text == "0":
        return timedelta(0)
    if not text or _DURATION.sub("", text):
        raise ValueError(f"{text!r} is not a duration; write 250ms, 2s, 5m or 1h")
    try:
        return timedelta(
            seconds=sum(float(number) * _UNITS[unit] for number, unit in _DURATION.findall(text))
        )
    except OverflowError:
        raise ValueError(f"must be at most {timedelta.max.days} days (got {text!r})") from None


def format_duration(value: timedelta) -> str:
    """Return the shortest text that `parse_duration` reads back as `value`."""
    milliseconds = round(value / _MILLISECOND)
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)):
        if milliseconds and milliseconds % size == 0:
            return f"{milliseconds // size}{unit}"
    if abs(milliseconds) > _SECOND_MS:
        return f"{milliseconds / _SECOND_MS:.3f}".rstrip("0") + "s"
    return f"{milliseconds}ms"
