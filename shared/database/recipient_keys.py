"""The keys by which a job's address is compared with suppressions, in SQL.

Releases before schema 0014 compared by case folding, for which `fußball.de` and `fussball.de` are
one domain. Their rows have only the folded key: a job `recipient_key`, a suppression an `address`
without a `form`. Such a suppression covers every address that folds to it, as it did before,
because it is not known which of them was meant. Rows of later releases have both keys, because
processes of both releases run side by side during an upgrade.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_
from sqlalchemy.sql.expression import collate

from outbox_server.shared.database.erased_keys import erased_key
from outbox_server.shared.database.models import EmailJob, Suppression
from outbox_server.shared.states import SuppressionForm


def exact_job_key() -> ColumnElement[str]:
    """Return a job's key: the one that the intake stored, or its address in lower case."""
    return func.coalesce(EmailJob.address_key, folded_job_key())


def folded_job_key() -> ColumnElement[str]:
    """Return the key of a job by which older releases compare.

    The address is lowered under the collation "C", because a locale may change letters beyond ASCII
    or, like Turkish, lower an ASCII letter differently. The result has the default collation again,
    which the index of suppressions uses.
    """
    lowered = func.lower(collate(EmailJob.recipient, "C"))
    return func.coalesce(EmailJob.recipient_key, collate(lowered, "default"))


def covers_job(user_id: Any) -> ColumnElement[bool]:
    """Return the condition that a suppression of `user_id` covers a job.

    A job of an older release that has letters beyond ASCII has no exact key. It is covered by what
    those releases would find.
    """
    exact = [exact_job_key(), erased_key(user_id, exact_job_key())]
    # NULL for most jobs, whose two keys are the same.
    folded = [EmailJob.recipient_key, erased_key(user_id, EmailJob.recipient_key)]
    of_older_release = and_(EmailJob.recipient_key.is_not(None), EmailJob.address_key.is_(None))
    return and_(
        Suppression.user_id == user_id,
        Suppression.address.in_([*exact, *folded]),
        or_(
            Suppression.form.is_(None),
            and_(Suppression.form == SuppressionForm.EXACT, Suppression.address.in_(exact)),
            of_older_release,
        ),
    )
