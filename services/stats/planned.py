"""Checks the options of a planned batch. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from outbox_server.shared import bounds
from outbox_server.shared.errors import InvalidInput, Violations


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """The options that decide when mails of a planned batch are due. `start` None means now."""

    recipients: int
    start: datetime | None = None
    spacing: timedelta = timedelta(0)
    spread_until: datetime | None = None
    expire_after: timedelta | None = None

    def spacing_from(self, start: datetime, field: str = "planned_batch") -> timedelta:
        """Return the time between two mails, the first of which is due at `start`.

        Raises:
            InvalidInput: SPREAD_UNTIL_INVALID.
        """
        bounds.check_spread(
            f"{field}.options.spread_until",
            self.spread_until,
            spacing=self.spacing,
            start=start,
            longest_wait=self.expire_after,
        )
        if self.spread_until is None or self.recipients == 1:
            return self.spacing
        return (self.spread_until - start) / (self.recipients - 1)


def check_planned(planned: PlannedBatch, field: str = "planned_batch") -> PlannedBatch:
    """Return `planned`. `field` is its path in the request.

    Raises:
        InvalidInput: RECIPIENT_COUNT_INVALID, SPACING_INVALID, EXPIRE_AFTER_INVALID.
    """
    wrong = Violations()
    with wrong:
        if not 1 <= planned.recipients <= bounds.MAX_RECIPIENTS:
            raise InvalidInput.field(
                f"{field}.recipient_count",
                f"must be 1 to {bounds.MAX_RECIPIENTS:,} (got {planned.recipients:,})",
                reason="RECIPIENT_COUNT_INVALID",
            )
    with wrong:
        bounds.check_spacing(f"{field}.options.spacing", planned.spacing)
    with wrong:
        if planned.expire_after is not None:
            bounds.check_expire_after(f"{field}.options.expire_after", planned.expire_after)
    wrong.raise_any()
    return planned
