"""Converts previews of mails to protos."""

from __future__ import annotations

from typing import Final

from outbox.v1 import batch_service_pb2, email_job_pb2

from outbox_server.services.scheduler.previewing import Omission, Preview, ShownMail
from outbox_server.shared.intake.option_mapping import to_rejections
from outbox_server.shared.intake.rows import RowRejection

_OMISSIONS: Final = {
    omission: batch_service_pb2.RowOmission.Value(f"ROW_OMISSION_{omission.name}")
    for omission in Omission
}


def to_mail(mail: ShownMail) -> email_job_pb2.RenderedMail:
    """Return the proto of a mail."""
    return email_job_pb2.RenderedMail(
        sender=mail.sender,
        recipient=mail.message.recipient,
        message=mail.message.data,
        smtputf8=mail.message.needs_smtputf8,
    )


def to_preview(preview: Preview) -> batch_service_pb2.PreviewBatchResponse:
    """Return the proto of the rows of a batch."""
    return batch_service_pb2.PreviewBatchResponse(
        rows=[_row(number, row) for number, row in preview.rows],
        email_column=preview.email_column,
    )


def _row(number: int, row: ShownMail | RowRejection | Omission) -> batch_service_pb2.PreviewedRow:
    found = batch_service_pb2.PreviewedRow(row_number=number)
    match row:
        case ShownMail():
            found.mail.CopyFrom(to_mail(row))
        case RowRejection():
            found.rejection.CopyFrom(to_rejections([row])[0])
        case Omission():
            found.omission = _OMISSIONS[row]
    return found
