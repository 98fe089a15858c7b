"""What the address of a job shares with a suppression of it, in SQL."""

from __future__ import annotations

from sqlalchemy import ColumnElement, func
from sqlalchemy.sql.expression import collate

from outbox_server.shared.database.models import EmailJob


def recipient_key() -> ColumnElement[str]:
    """Return a job's key: the one that the intake kept, or its address in lower case.

    Under "C", for the locale may know letters beyond ASCII or, as Turkish does, another lower case
    of an ASCII one; and back, for the index of suppressions is in the order of the database.
    """
    lowered = func.lower(collate(EmailJob.recipient, "C"))
    return func.coalesce(EmailJob.recipient_key, collate(lowered, "default"))
