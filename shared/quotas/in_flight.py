"""Counts the calls, uploads and watches of each user in this process, against the user's quotas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from outbox_server.shared.user_quotas import UserQuotas


class CallGroup(StrEnum):
    """The calls that a quota counts together; the value is the quota's name."""

    CALLS = "calls"
    UPLOADS = "uploads"
    WATCHES = "watches"


class CallsInFlight:
    """The calls in flight by user: those that run, and those that wait for a place."""

    def __init__(self) -> None:
        # It has only users with a call in flight.
        self._counts: Counter[tuple[str, CallGroup]] = Counter()

    @contextmanager
    def counted(
        self, user_id: str | None, quotas: UserQuotas | None, group: CallGroup
    ) -> Iterator[None]:
        """Count a call. Callers who act for all users are not counted: they have no quotas.

        Raises:
            ResourceExhausted: USER_CALLS_EXCEEDED, USER_UPLOADS_EXCEEDED, USER_WATCHES_EXCEEDED.
        """
        if user_id is None or quotas is None:
            yield
            return
        key = user_id, group
        refusal = quotas.exceeded(group, user_id, self._counts[key])
        if refusal is not None:
            raise refusal
        self._counts[key] += 1
        try:
            yield
        finally:
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]
