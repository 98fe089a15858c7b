"""The types of settings that are written as text: how the value of a variable is read."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator
from pydantic_settings import NoDecode

from outbox_server.shared.durations import parse_duration
from outbox_server.shared.store_urls import check_database_url, check_redis_url

_ZERO: Final = timedelta(0)
_LONGEST_WAIT: Final = timedelta(days=30)


def _duration(value: Any) -> Any:
    return parse_duration(value) if isinstance(value, str) else value


def _durations(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(parse_duration(part) for part in value.split(",") if part.strip())
    return value


def _waits(value: Any) -> Any:
    waits = _durations(value)
    if isinstance(waits, tuple) and not waits:
        raise ValueError("write at least one duration, such as 5m")
    if isinstance(waits, tuple) and not all(_ZERO < wait <= _LONGEST_WAIT for wait in waits):
        raise ValueError(f"each must be more than 0 and at most {_LONGEST_WAIT.days}d")
    return waits


def _retention(value: Any) -> Any:
    duration = None if value == "" else _duration(value)
    return None if duration == _ZERO else duration


# A duration, such as `250ms`, `2s`, `1h30m`.
Duration = Annotated[timedelta, BeforeValidator(_duration)]
# Durations, separated by commas.
Durations = Annotated[tuple[timedelta, ...], NoDecode, BeforeValidator(_durations)]
# The waits before a mail server is tried again: never zero, and short enough to give a valid date.
Waits = Annotated[tuple[timedelta, ...], NoDecode, BeforeValidator(_waits)]
# An age after which rows are removed. None, from an empty value or 0, means never.
Retention = Annotated[timedelta | None, BeforeValidator(_retention)]
DatabaseUrl = Annotated[str, AfterValidator(check_database_url)]
RedisUrl = Annotated[str, AfterValidator(check_redis_url)]
