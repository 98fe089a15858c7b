"""What a caller decides about a batch, checked. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from outbox_server.services.scheduler.send_times import BadScheduleTime, check_time_zone
from outbox_server.shared import bounds
from outbox_server.shared.errors import FieldViolation, InvalidInput
from outbox_server.shared.states import BatchMode, DuplicatePolicy

_MILLISECOND: Final = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """The options of a batch; `subject`, `body` and `html` None: the rows' own.

    `schedule_time` None: now.
    """

    request_id: str
    sender_id: int
    subject: str | None = None
    body: str | None = None
    html: str | None = None
    schedule_time: datetime | None = None
    spacing_ms: int = 0
    duplicates: DuplicatePolicy = DuplicatePolicy.KEEP_FIRST
    mode: BatchMode = BatchMode.PERMISSIVE
    time_zone: str = "UTC"
    # None: a job waits for as long as it takes.
    expire_after_ms: int | None = None
    # None: `spacing_ms` decides.
    spread_until: datetime | None = None

    def canonical(self) -> bytes:
        """Return the same bytes for the same options: what an unset field means is written out."""
        return json.dumps(
            [
                self.sender_id,
                self.subject,
                self.body,
                self.html,
                self.schedule_time.isoformat() if self.schedule_time else None,
                self.spacing_ms,
                int(self.duplicates),
                int(self.mode),
                self.time_zone,
                self.expire_after_ms,
                # Only where it is set: what was accepted before there was one stays the same.
                *([self.spread_until.isoformat()] if self.spread_until else []),
            ]
        ).encode()

    @property
    def template_bytes(self) -> int:
        """The size of the templates together."""
        return sum(len((text or "").encode()) for text in (self.subject, self.body, self.html))


def check_options(options: BatchOptions, field: str = "options") -> BatchOptions:
    """Return `options`; `field` is where the request has them.

    Templates are looked at when they are parsed, all but what no database takes.

    Raises:
        InvalidInput: REQUEST_ID_REQUIRED, REQUEST_ID_INVALID, TEMPLATE_INVALID, SPACING_INVALID,
            EXPIRE_AFTER_INVALID, SPREAD_UNTIL_INVALID, UNKNOWN_TIME_ZONE.
    """
    if not options.request_id:
        raise InvalidInput.field(
            f"{field}.request_id",
            "must be set, to another text for each batch: it makes the call safe to repeat",
            reason="REQUEST_ID_REQUIRED",
        )
    bounds.REQUEST_ID.check(f"{field}.request_id", options.request_id)
    for name in ("subject", "body", "html"):
        nul = (getattr(options, name) or "").find("\0")
        if nul >= 0:
            raise InvalidInput.field(
                f"{field}.{name}",
                f"character {nul + 1} is a NUL, which no mail can contain",
                reason="TEMPLATE_INVALID",
            )
    if not 0 <= options.spacing_ms <= bounds.MAX_SPACING // _MILLISECOND:
        raise InvalidInput.field(
            f"{field}.spacing", "takes 0 s to 7 days", reason="SPACING_INVALID"
        )
    shortest, longest = bounds.MIN_EXPIRE_AFTER, bounds.MAX_EXPIRE_AFTER
    if options.expire_after_ms is not None and not (
        shortest <= options.expire_after_ms * _MILLISECOND <= longest
    ):
        raise InvalidInput.field(
            f"{field}.expire_after", "takes 1 s to 366 days", reason="EXPIRE_AFTER_INVALID"
        )
    check_spread(options, options.schedule_time, field)
    bounds.TIME_ZONE.check(f"{field}.time_zone", options.time_zone)
    try:
        check_time_zone(options.time_zone)
    except BadScheduleTime as error:
        raise InvalidInput.field(f"{field}.time_zone", error.message, reason=error.reason) from None
    return options


def check_spread(options: BatchOptions, start: datetime | None, field: str = "options") -> None:
    """Look at `spread_until` once more, now that the `start` of the batch is known.

    Raises:
        InvalidInput: SPREAD_UNTIL_INVALID.
    """
    bounds.check_spread(
        f"{field}.spread_until",
        options.spread_until,
        spacing=options.spacing_ms * _MILLISECOND,
        start=start,
        longest_wait=(options.expire_after_ms or 0) * _MILLISECOND,
    )


def under_options(error: InvalidInput, field: str = "options") -> InvalidInput:
    """Return the error of a template with the place that it has in the request."""
    return InvalidInput(
        f"{field}.{error.message}",
        reason=error.reason,
        violations=[
            FieldViolation(f"{field}.{violation.field}", violation.description)
            for violation in error.violations
        ],
        metadata=error.metadata,
    )
