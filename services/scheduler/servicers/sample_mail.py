"""Converts the request of a test mail, which is a batch with one row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from outbox.v1 import batch_pb2

from outbox_server.services.scheduler.servicers.calls import checked_options
from outbox_server.shared.errors import FieldViolation, InvalidInput, Violations
from outbox_server.shared.intake.batch_options import BatchOptions
from outbox_server.shared.states import BatchMode

# Options that mean nothing to one mail that is due at once, or name columns of a CSV.
_IGNORED: Final = (
    "schedule_time",
    "spacing",
    "spread_until",
    "duplicates",
    "mode",
    "email_column",
    "external_id_column",
    "label_columns",
    "skip_lines",
)


def options_of_test(
    asked: batch_pb2.BatchOptions, found: Violations
) -> tuple[str | None, BatchOptions]:
    """Return the user to act for, and the options of the batch. `found` has errors of the request.

    Raises:
        InvalidInput, NotFound: see `checked_options`.
    """
    options = batch_pb2.BatchOptions()
    options.CopyFrom(asked)
    for name in _IGNORED:
        options.ClearField(name)
    user_id, checked = checked_options(options, found=found)
    return user_id, replace(checked, mode=BatchMode.STRICT, test=True)


@contextmanager
def naming_recipient() -> Iterator[None]:
    """Put the field `recipient` into the error of the one row."""
    try:
        yield
    except InvalidInput as error:
        if error.reason != "ROW_REJECTED":
            raise
        violations = [
            FieldViolation(one.field.replace("rows[1]", "recipient", 1), one.description)
            for one in error.violations
        ]
        first = violations[0]
        raise InvalidInput(
            f"{first.field}: {first.description}", reason=error.reason, violations=violations
        ) from None
