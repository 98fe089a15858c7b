"""The key by which a job's address is compared with suppressions, in SQL."""

from __future__ import annotations

from sqlalchemy import ColumnElement, func
from sqlalchemy.sql.expression import collate

from outbox_server.shared.database.models import EmailJob


def recipient_key() -> ColumnElement[str]:
    """Return a job's key: the one that the intake stored, or its address in lower case.

    The address is lowered under the collation "C", because a locale may change letters beyond ASCII
    or, like Turkish, lower an ASCII letter differently. The result has the default collation again,
    which the index of suppressions uses.
    """
    lowered = func.lower(collate(EmailJob.recipient, "C"))
    return func.coalesce(EmailJob.recipient_key, collate(lowered, "default"))
