"""The records of a new batch, and the SQL that storing one batch and storing a group share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import BigInteger, ColumnElement, Text, cast, func, literal

from outbox_server.shared.intake.batch_options import BatchOptions

# The seed of the keys of the advisory locks on requests. Any number would do.
_LOCK_SPACE: Final = 0x5251


@dataclass(frozen=True, slots=True)
class IntakeSender:
    """What an intake has to know about the sender."""

    sender_id: int
    user_id: str
    deleted: bool
    email: str
    # The domains that are assigned to the sender's user.
    domains: Sequence[str]


@dataclass(frozen=True, slots=True)
class KnownRequest:
    """A batch that was accepted under the same `request_id`."""

    batch_id: int
    request_hash: bytes


@dataclass(frozen=True, slots=True)
class BegunBatch:
    """A batch whose row is written but not committed."""

    batch_id: int
    start_at: datetime
    accepted_at: datetime


@dataclass(frozen=True, slots=True)
class IntakeCounts:
    """The numbers of rows by their result."""

    accepted: int = 0
    rejected: int = 0
    duplicate: int = 0
    suppressed: int = 0


@dataclass(frozen=True, slots=True)
class FinishedBatch:
    """The final counts of a batch, and how many rejections are above the quota and not stored."""

    counts: IntakeCounts
    dropped: int


def batch_values(
    options: BatchOptions,
    user_id: str,
    variable_names: Sequence[str],
    email_column: str,
    trace_parent: str | None,
) -> dict[str, Any]:
    """Return what the row of a batch has from the request."""
    return {
        "user_id": user_id,
        "sender_id": options.sender_id,
        "request_id": options.request_id,
        "subject": options.subject,
        "body": options.body,
        "html": options.html,
        "variable_names": list(variable_names),
        "email_column": email_column or None,
        "expire_after_ms": options.expire_after_ms,
        "duplicates": options.duplicates,
        "mode": options.mode,
        "trace_parent": trace_parent,
        "reply_to": options.reply_to,
        "headers": [list(header) for header in options.headers] or None,
        "name_column": options.head.name_column or None,
        "external_id": options.external_id or None,
        "labels": dict(options.labels) or None,
        "row_labels": bool(options.label_columns),
        "test": options.test,
    }


def request_lock(user_id: Any, request_id: Any) -> ColumnElement[int]:
    """Return the key of the advisory lock on a `request_id` of a user.

    Whoever writes a batch holds it until the commit. So others can test whether a batch with this
    id is being written, without waiting for the end of an upload.
    """
    text = cast(user_id, Text) + literal("\n", Text) + cast(request_id, Text)
    # The key has all 64 bits, so that nobody can find another request with the same key, which
    # would have to wait for their upload.
    return func.hashtextextended(text, literal(_LOCK_SPACE, BigInteger))
