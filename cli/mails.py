"""Shows the mails of previews."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO, Final

from outbox.v1 import batch_service_pb2 as pb
from outbox.v1.batch_pb2 import BatchOptions
from outbox.v1.email_job_pb2 import RenderedMail
from outbox_client import Client

from outbox_server.cli.flags import in_flags
from outbox_server.cli.output import OutputFormat, show
from outbox_server.cli.terminal import note, write_exactly

# The maximum part of a file that one call accepts.
_MOST_BYTES: Final = 4 * 1024 * 1024 - 256 * 1024
_OMISSIONS: Final = {
    pb.ROW_OMISSION_NO_ROW: "there is no such row, or it is empty",
    pb.ROW_OMISSION_DUPLICATE: "an earlier row has the same address",
    pb.ROW_OMISSION_SUPPRESSED: "its address is suppressed",
}


def show_mail(mail: RenderedMail, output: OutputFormat) -> None:
    """Print a mail: its exact bytes into a file or a pipe, as text on a terminal."""
    if output is OutputFormat.JSON:
        show(mail, output)
    else:
        write_exactly(mail.message)


def show_preview(
    client: Client,
    options: BatchOptions,
    source: BinaryIO,
    rows: Sequence[int],
    output: OutputFormat,
) -> bool:
    """Show the mails of rows; none means the first one. Return whether each row becomes a mail."""
    content = source.read(_MOST_BYTES)
    if source.read(1):
        # The last line may be cut off.
        content = content[: content.rfind(b"\n") + 1]
        note(f"only the first {len(content):,} bytes of the file are read")
    request = pb.PreviewBatchRequest(options=options, csv=content, row_numbers=rows)
    answer = client.batches.PreviewBatch(request)
    if output is OutputFormat.JSON:
        show(answer, output)
    for found in answer.rows if output is OutputFormat.TABLE else ():
        if found.HasField("mail"):
            note(f"row {found.row_number}, to {found.mail.recipient}:")
            show_mail(found.mail, output)
            continue
        why = in_flags(found.rejection.message)
        if found.omission:
            why = _OMISSIONS[found.omission]
        note(f"row {found.row_number} becomes no mail: {why}")
    return all(found.HasField("mail") for found in answer.rows)
