"""The columns of a sender's cooldown, for statements that read it together with other tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy.orm import InstrumentedAttribute

from outbox_server.shared.cooldowns.record import CooldownRecord
from outbox_server.shared.database.models import Cooldown

_ATTRIBUTES: Final[Sequence[InstrumentedAttribute[Any]]] = (
    Cooldown.since,
    Cooldown.next_probe_at,
    Cooldown.refusals,
    Cooldown.smtp_code,
    Cooldown.enhanced_code,
    Cooldown.message,
)
# Statements with an outer join to Cooldown use these. The prefix tells them from other columns.
COOLDOWN_COLUMNS: Final = tuple(each.label(f"cooldown_{each.key}") for each in _ATTRIBUTES)


def cooldown_of(row: Any) -> CooldownRecord | None:
    """Return the cooldown in a row that has COOLDOWN_COLUMNS; None if the sender has none."""
    if row.cooldown_since is None:
        return None
    return CooldownRecord(
        since=row.cooldown_since,
        next_probe_at=row.cooldown_next_probe_at,
        refusals=row.cooldown_refusals,
        message=row.cooldown_message,
        smtp_code=row.cooldown_smtp_code,
        enhanced_code=row.cooldown_enhanced_code,
    )
