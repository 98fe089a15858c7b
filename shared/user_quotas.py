"""The quotas of a user, and the errors when one is reached. Pure.

A quota only limits additions. If an operator lowers it, what exists stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from outbox_server.shared.errors import ResourceExhausted

if TYPE_CHECKING:
    from outbox_server.shared.settings import Settings

# When to try again: calls and streams end soon, and waiting jobs take longer.
_SOON: Final = timedelta(seconds=2)
_LATER: Final = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class UserQuotas:
    """The maximum that one user may have. The field `x` is the setting `OUTBOX_USER_X`.

    `calls`, `uploads` and `watches` count in each process, `unproven_endpoints` in each dispatcher,
    all others in the whole installation.
    """

    waiting_jobs: int
    senders: int
    calls: int
    uploads: int
    watches: int
    stored_rejections: int
    unproven_endpoints: int
    stored_events: int
    suppressions: int
    webhooks: int

    @classmethod
    def from_settings(cls, settings: Settings) -> UserQuotas:
        """Return the defaults: those of users without overrides."""
        values = {name: getattr(settings, f"user_{name}") for name in QUOTAS}
        if values["unproven_endpoints"] is None:
            values["unproven_endpoints"] = max(2, settings.dispatcher_concurrency // 4)
        return cls(**values)

    def overridden(self, overrides: Mapping[str, int | None]) -> UserQuotas:
        """Return these quotas with the overrides of one user. None means the default."""
        given = {name: value for name, value in overrides.items() if value is not None}
        return replace(self, **given) if given else self

    def exceeded(
        self, name: str, user_id: str, current: int, more: int = 1
    ) -> ResourceExhausted | None:
        """Return the error if a user who has `current` may not have `more`; else None.

        Its reason is `USER_<NAME>_EXCEEDED`.
        """
        limit: int = getattr(self, name)
        if current + more <= limit:
            return None
        what = name.replace("_", " ")
        asked = f", and this would be {more:,} more" if more > 1 else ""
        return ResourceExhausted(
            f"the user {user_id} has {current:,} of at most {limit:,} {what}{asked}; wait until "
            "there are fewer, or ask the operator for a larger quota",
            reason=f"USER_{name.upper()}_EXCEEDED",
            metadata={"user": user_id, "limit": str(limit), "current": str(current)},
            retry_after=_SOON if name in ("calls", "uploads", "watches") else _LATER,
        )


QUOTAS: Final = tuple(field.name for field in fields(UserQuotas))
# The smallest values, if not 0.
LEAST_QUOTAS: Final[Mapping[str, int]] = {"unproven_endpoints": 1}
