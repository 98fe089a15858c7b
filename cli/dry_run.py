"""`outbox schedule --dry-run`: reads the rows as the scheduler does, and asks for a forecast."""

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
from outbox_server.cli.lazy import CommandFailed
from outbox_server.cli.output import note
from outbox_server.cli.progress import upload_progress
from outbox_server.services.scheduler.blocks import BlockReader
from outbox_server.services.scheduler.payloads import CsvPayload
from outbox_server.services.scheduler.servicers.batch_mapping import from_options, to_rejections
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import BatchMode

_READ_BYTES: Final = 64 * 1024


@dataclass(slots=True)
class Reading:
    """What would become of the rows, but for suppressions, which the scheduler alone knows."""

    accepted: int = 0
    duplicates: int = 0
    # Accepted rows that name their own time.
    timed: int = 0
    rejections: list[Rejection] = field(default_factory=list)
    # Whether one rejection refuses all.
    strict: bool = False

    @property
    def rows(self) -> int:
        """How many rows were read."""
        return self.accepted + self.duplicates + len(self.rejections)


class _File:
    """A file in chunks."""

    def __init__(self, source: BinaryIO) -> None:
        self.read_bytes = 0
        self._source = source

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self._source.read(_READ_BYTES):
            self.read_bytes += len(chunk)
            yield chunk

    def close(self) -> None:
        """Do nothing: whoever opened it closes it."""


def read(options: BatchOptions, source: BinaryIO) -> Reading:
    """Read the CSV as the scheduler does.

    Raises:
        InvalidInput: the options or a template are wrong, or it is no CSV with an address column.
    """
    checked = from_options(options)
    # The scheduler may have another limit (OUTBOX_MAX_MESSAGE_BYTES); this is what it has unset.
    largest = Settings.model_fields["max_message_bytes"].default
    file, reading = _File(source), Reading()
    reader = BlockReader(CsvPayload(file), checked, largest)
    with closing(reader), upload_progress("checking") as progress:
        while block := reader.next():
            reading.accepted += len(block.rows)
            reading.duplicates += block.duplicates
            reading.timed += sum(row.schedule_time is not None for row in block.rows)
            reading.rejections += to_rejections(block.rejections)
            progress(UploadProgress(file.read_bytes, _size_of(source), reading.rows))
    reading.strict = checked.mode is BatchMode.STRICT
    note(
        f"{reading.rows} rows read: {reading.accepted} would be accepted, "
        f"{len(reading.rejections)} rejected, {reading.duplicates} duplicate; "
        "suppressions were not looked at; nothing was scheduled"
    )
    return reading


def _size_of(source: BinaryIO) -> int | None:
    """Return how long the file is; None: nobody knows, as of a pipe."""
    if not source.seekable():
        return None
    return os.fstat(source.fileno()).st_size


def check(reading: Reading) -> None:
    """Say whether there would be a batch.

    Raises:
        CommandFailed: it would be refused.
    """
    if not reading.rejections:
        return
    first = reading.rejections[0]
    named = f"the first: row {first.row_number}: {first.message}"
    if reading.strict:
        raise CommandFailed(f"the batch would be refused, as its mode is STRICT; {named}")
    if not reading.accepted + reading.duplicates:
        raise CommandFailed(f"the batch would be refused, as every row is rejected; {named}")


def forecast(options: BatchOptions, reading: Reading, server: str | None) -> ForecastBatchResponse:
    """Ask the stats service when a batch of so many rows would end."""
    planned = PlannedBatch(options=options, recipient_count=reading.accepted)
    request = ForecastBatchRequest(user_id=options.user_id, planned_batch=planned)
    with connection("stats", server) as client:
        try:
            found = client.stats.ForecastBatch(request)
        except Unimplemented:
            raise CommandFailed("the stats service has no forecasts yet") from None
    if reading.timed:
        note(f"{reading.timed} rows have their own schedule_time, which the forecast leaves out")
    return found
