"""The settings that are the same in every process, because a difference would break a promise.

docs/operating.md says for each setting whether it is one of these, and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, Final, Literal, Self

from outbox_server.shared.durations import format_duration
from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.settings import Settings, check_retention

_MILLISECOND: Final = timedelta(milliseconds=1)
# The data in Redis depends on these. A change of one begins a new key space, which is loaded from
# PostgreSQL, because what was counted for the old value is not enough for the new one.
KEYED: Final = ("shards", "rate_window", "min_gap", "user_hourly_limit", "user_gap")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreedValues:
    """One value of each of these settings, with the names and types of `Settings`."""

    shards: int
    rate_window: timedelta
    min_gap: timedelta
    user_hourly_limit: int
    user_gap: timedelta
    uncertain_policy: Literal["resend", "hold"]

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Return the values of a process's settings. Durations have whole milliseconds."""
        values: dict[str, Any] = {name: _whole(getattr(settings, name)) for name in NAMES}
        return cls(**values)

    def apply_to(self, settings: Settings) -> Settings:
        """Return the settings with these values.

        Raises:
            ConfigurationError: another setting contradicts them.
        """
        applied = settings.model_copy(update=self.by_name())
        try:
            check_retention(applied.retention, applied.rate_window, applied.quota_day)
        except ValueError as error:
            raise ConfigurationError(f"OUTBOX_RETENTION: {error}") from None
        return applied

    def by_name(self) -> dict[str, Any]:
        """Return the values by the names of their settings."""
        return {name: getattr(self, name) for name in NAMES}

    def texts(self) -> dict[str, str]:
        """Return the values as texts for the environment."""
        return {name: text_of(value) for name, value in self.by_name().items()}

    def changed_from(self, other: AgreedValues) -> tuple[str, ...]:
        """Return the names of the values that differ."""
        return tuple(name for name in NAMES if getattr(self, name) != getattr(other, name))

    def differences(self, given: Settings) -> list[str]:
        """Return a text for each value that `given` sets, and that differs from these."""
        here = AgreedValues.from_settings(given)
        return [
            f"{variable_of(name)} is {here.texts()[name]} here, and {self.texts()[name]} for the "
            "whole installation"
            for name in here.changed_from(self)
            if name in given.model_fields_set
        ]

    def refuse_other(self, given: Settings) -> None:
        """Refuse an environment that contradicts these values.

        Raises:
            ConfigurationError: it does; the text has both values, and what to do.
        """
        differences = self.differences(given)
        if differences:
            raise ConfigurationError(
                f"{'; '.join(differences)}: remove the variable, or change the value of all "
                "processes by `outbox settings set`"
            )


def _whole(value: Any) -> Any:
    return value - value % _MILLISECOND if isinstance(value, timedelta) else value


NAMES: Final = tuple(field.name for field in fields(AgreedValues))


@dataclass(frozen=True, slots=True)
class AgreedSettings:
    """The stored values, and the key space in Redis that belongs to them.

    A key space is never used for other values. The key space of the first values has the empty
    name, because releases without stored values use it.
    """

    values: AgreedValues
    key_space: str = ""
    # The earlier key spaces, the oldest first. Their keys can be deleted.
    old_key_spaces: tuple[str, ...] = ()


def variable_of(name: str) -> str:
    """Return the variable of a setting."""
    return f"OUTBOX_{name.upper()}"


def text_of(value: Any) -> str:
    """Return a value as a text for the environment."""
    return format_duration(value) if isinstance(value, timedelta) else str(value)


def texts_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return values as texts for the environment."""
    return {name: text_of(value) for name, value in values.items()}
