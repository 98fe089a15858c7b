"""Makes the heads of senders from the rows that PostgreSQL has of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.gap import effective_gap
from outbox_server.shared.heads.statements import HISTORY_STATEMENT
from outbox_server.shared.heads.users import spans_of
from outbox_server.shared.queue.circuit_keys import CircuitKeys, user_key
from outbox_server.shared.queue.keys import JobRef
from outbox_server.shared.queue.queue import HEAD_SIZE
from outbox_server.shared.queue.records import ActiveLease, Head, PastEnd, brings_history
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.sending_hours import SendingHours
from outbox_server.shared.settings import Settings

_DAY_MS = 24 * 60 * 60 * 1000
# When to load a sender again whose waiting mail is all paused.
_LOOK_AGAIN = timedelta(hours=1)


def _opening(hours: str | None, now: int) -> tuple[int, int] | None:
    """Return the opening that contains `now`, or the next one; None without sending hours."""
    if hours is None:
        return None
    sending_hours = SendingHours.from_text(hours)
    opens = sending_hours.opens(now)
    # No opening within two weeks: search again on the next day.
    return (now + _DAY_MS, now + _DAY_MS) if opens is None else (opens, sending_hours.closes(opens))


def _wake(first_end: timedelta | None, *, left_out: bool) -> timedelta | None:
    """Return the time until the sender must be loaded again, because the pause of a batch ends.

    `left_out`: all its waiting jobs are of paused batches. Without a next time, Redis would forget
    the sender, and the patrol would load it in each of its rounds.
    """
    if left_out:
        return _LOOK_AGAIN if first_end is None else min(first_end, _LOOK_AGAIN)
    return first_end


def _no_head(sender_id: int) -> Head:
    """Return an empty head, for a sender that PostgreSQL does not have: it is not visited again."""
    return Head(
        sender_id=sender_id,
        hourly_limit=1,
        gap=timedelta(0),
        max_in_flight=1,
        active=False,
        jobs=(),
        more=False,
    )


class HeadReader:
    """Makes heads from rows, and reads the history of those senders whose history Redis lacks."""

    def __init__(self, settings: Settings) -> None:
        self._window = settings.rate_window
        self._floor = settings.min_gap
        self._circuit_keys = CircuitKeys(
            SecretBox.from_settings(settings), override=settings.smtp_override
        )

    async def read(
        self, connection: AsyncConnection, epochs: Mapping[int, str], rows: Sequence[Row[Any]]
    ) -> tuple[list[Head], dict[int, list[int]]]:
        """Return the heads of the senders in `epochs`, and the ids of each sender's markers.

        `rows`: those of HEADS_STATEMENT. `connection`: the one that read them, in one snapshot if a
        sender's history is read too.
        """
        ends: dict[int, list[PastEnd]] = {}
        leases: dict[int, list[ActiveLease]] = {}
        fresh = {sender_id for sender_id, epoch in epochs.items() if brings_history(epoch)}
        if fresh:
            gaps = (effective_gap(row.min_gap_ms, self._floor) for row in rows if row.id in fresh)
            reach = max([self._window, *gaps])
            values = {"senders": list(fresh), "reach": reach}
            for row in await connection.execute(HISTORY_STATEMENT, values):
                if row.leased:
                    leases[row.sender_id] = [ActiveLease(*span[:2]) for span in spans_of(row)]
                else:
                    ends[row.sender_id] = [PastEnd(*span) for span in spans_of(row)]
                await asyncio.sleep(0)
        heads = []
        for row in rows:
            heads.append(
                self._head(row, tuple(ends.get(row.id, ())), tuple(leases.get(row.id, ())))
            )
            # A chunk with long heads takes 0.1 s, and mail is sent meanwhile.
            await asyncio.sleep(0)
        known = {row.id for row in rows}
        heads += [_no_head(sender_id) for sender_id in epochs if sender_id not in known]
        return heads, {row.id: row.markers or [] for row in rows}

    def _head(
        self, row: Row[Any], ends: tuple[PastEnd, ...], leases: tuple[ActiveLease, ...]
    ) -> Head:
        jobs = tuple(
            (JobRef(job_id, attempt + 1), due)
            for job_id, attempt, due in zip(
                row.ids or (), row.attempts or (), row.dues or (), strict=True
            )
        )
        return Head(
            sender_id=row.id,
            hourly_limit=row.hourly_limit,
            gap=effective_gap(row.min_gap_ms, self._floor),
            max_in_flight=row.max_in_flight,
            active=row.active,
            jobs=jobs[:HEAD_SIZE],
            more=len(jobs) > HEAD_SIZE,
            user=user_key(row.user_id),
            user_limited=bool(row.user_hourly_limit or row.user_min_gap_ms),
            endpoint=self._circuit_keys.of_sender(
                row.user_id,
                row.smtp_host,
                row.smtp_port,
                row.smtp_security,
                row.smtp_username,
                password=row.smtp_password,
                oauth2_credentials_id=row.oauth2_credentials_id,
            ),
            revision=row.revision,
            opening=_opening(row.sending_hours, row.now),
            cooldown=row.cooldown,
            paused_until_ms=row.paused_until or 0,
            wake=_wake(row.wake, left_out=row.left_out and not jobs),
            ends=ends,
            leases=leases,
        )
