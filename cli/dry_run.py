"""`outbox schedule --dry-run`: checks the rows as the scheduler does, and gets a forecast."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import BinaryIO, Final

from outbox.v1.batch_pb2 import BatchOptions, Rejection
from outbox.v1.stats_service_pb2 import ForecastBatchRequest, ForecastBatchResponse, PlannedBatch
from outbox_client import Unimplemented, UploadProgress

from outbox_server.cli.client import connection
from outbox_server.cli.flags import in_flags
from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.progress import upload_progress
from outbox_server.cli.terminal import note
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.intake.batch_options import BatchOptions as CheckedOptions
from outbox_server.shared.intake.blocks import BlockReader
from outbox_server.shared.intake.option_mapping import from_options, to_rejections
from outbox_server.shared.intake.payloads import CsvPayload
from outbox_server.shared.intake.rows import EMAIL_NAMES
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import BatchMode
from outbox_server.shared.templates.batch import variable_name

_READ_BYTES: Final = 64 * 1024


@dataclass(slots=True)
class CheckedRows:
    """How many rows would be accepted or not. Suppressions are unknown here and ignored."""

    accepted: int = 0
    duplicates: int = 0
    # Accepted rows with their own schedule_time.
    timed: int = 0
    rejections: list[Rejection] = field(default_factory=list)
    # Whether one rejected row rejects the batch.
    strict: bool = False

    @property
    def rows(self) -> int:
        """How many rows were read."""
        return self.accepted + self.duplicates + len(self.rejections)


class _ChunkReader:
    """Reads a file in chunks and counts the bytes."""

    def __init__(self, source: BinaryIO) -> None:
        self.read_bytes = 0
        self._source = source

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self._source.read(_READ_BYTES):
            self.read_bytes += len(chunk)
            yield chunk

    def close(self) -> None:
        """Do nothing: the caller closes the file."""


def read(options: BatchOptions, source: BinaryIO) -> CheckedRows:
    """Read the CSV as the scheduler does.

    Raises:
        CommandFailed: an option, a template or the header of the CSV is invalid.
    """
    try:
        return _read(from_options(options), source)
    except InvalidInput as error:
        fields = [violation.field for violation in error.violations]
        raise CommandFailed(in_flags(error.message, fields)) from None


def _read(checked: CheckedOptions, source: BinaryIO) -> CheckedRows:
    # This is the default. The scheduler may have another limit (OUTBOX_MAX_MESSAGE_BYTES).
    largest = Settings.model_fields["max_message_bytes"].default
    file, checked_rows = _ChunkReader(source), CheckedRows()
    reader = BlockReader(CsvPayload(file), checked, largest)
    with closing(reader), upload_progress("checking") as progress:
        while block := reader.next():
            checked_rows.accepted += len(block.rows)
            checked_rows.duplicates += block.duplicates
            checked_rows.timed += sum(row.schedule_time is not None for row in block.rows)
            checked_rows.rejections += to_rejections(block.rejections)
            progress(UploadProgress(file.read_bytes, _size_of(source), checked_rows.rows))
    if variable_name(reader.email_column) not in EMAIL_NAMES:
        note(f"the addresses are in the column {reader.email_column!r}")
    checked_rows.strict = checked.mode is BatchMode.STRICT
    note(
        f"{checked_rows.rows} rows read: {checked_rows.accepted} would be accepted, "
        f"{len(checked_rows.rejections)} rejected, {checked_rows.duplicates} duplicate; "
        "suppressions were not checked; nothing was scheduled"
    )
    return checked_rows


def _size_of(source: BinaryIO) -> int | None:
    """Return the size of the file, or None for a pipe, whose size is unknown."""
    if not source.seekable():
        return None
    return os.fstat(source.fileno()).st_size


def check(checked_rows: CheckedRows) -> None:
    """Check whether the scheduler would accept the batch.

    Raises:
        CommandFailed: it would reject the batch.
    """
    if not checked_rows.rejections:
        return
    first = checked_rows.rejections[0]
    named = f"the first one is in row {first.row_number}: {in_flags(first.message)}"
    if checked_rows.strict:
        raise CommandFailed(f"the batch would be rejected, because its mode is STRICT; {named}")
    if not checked_rows.accepted + checked_rows.duplicates:
        raise CommandFailed(f"the batch would be rejected, because every row is; {named}")


def forecast(
    options: BatchOptions, checked_rows: CheckedRows, server: str | None
) -> ForecastBatchResponse:
    """Forecast when a batch with the accepted rows would end."""
    planned = PlannedBatch(options=options, recipient_count=checked_rows.accepted)
    request = ForecastBatchRequest(user_id=options.user_id, planned_batch=planned)
    with connection("stats", server) as client:
        try:
            found = client.stats.ForecastBatch(request)
        except Unimplemented:
            raise CommandFailed("the stats service is too old for forecasts; upgrade it") from None
    if checked_rows.timed:
        note(f"{checked_rows.timed} rows have their own schedule_time, which the forecast ignores")
    return found
