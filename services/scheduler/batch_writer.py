"""Stores the rows of a batch, block by block, in the transaction of its intake."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Final, TypeVar

from outbox_server.services.scheduler.copy_format import Schedule, format_jobs, format_rejections
from outbox_server.services.scheduler.planning import OwnTimes, planned_mails
from outbox_server.services.scheduler.reading import ReaderSteps, refused_rows
from outbox_server.services.scheduler.storage.batches import BatchRecord
from outbox_server.services.scheduler.storage.checking import unstored_batch
from outbox_server.services.scheduler.storage.intake import IntakeTransaction
from outbox_server.services.scheduler.storage.new_batches import BegunBatch, IntakeCounts
from outbox_server.services.scheduler.storage.spreading import Spread
from outbox_server.shared import bounds
from outbox_server.shared.callers import next_part
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.forecast.simulation import JobGroup
from outbox_server.shared.intake.batch_options import BatchOptions
from outbox_server.shared.intake.blocks import ReadBlock
from outbox_server.shared.intake.rows import JobRow, RowRejection
from outbox_server.shared.states import BatchMode
from outbox_server.shared.user_quotas import UserQuotas

# How many rows are formatted, in about 1 ms, before other calls run.
_FORMATTED_AT_ONCE: Final = 500
_MILLISECOND: Final = timedelta(milliseconds=1)

T = TypeVar("T")


@dataclass(slots=True)
class BatchWriter:
    """Stores the blocks of a batch one by one, and counts the rows."""

    transaction: IntakeTransaction
    begun: BegunBatch
    options: BatchOptions
    user_id: str
    steps: ReaderSteps
    counts: IntakeCounts = field(default_factory=IntakeCounts)
    rejections: list[RowRejection] = field(default_factory=list)
    # Used only for a batch that is only checked: its forecast needs them.
    own_times: OwnTimes | None = None
    schedule: Schedule = field(init=False)
    quotas: UserQuotas = field(init=False)
    # Whether a row has labels of its own.
    row_labels: bool = False

    def __post_init__(self) -> None:
        self.schedule = Schedule(
            self.begun.start_at,
            self.begun.accepted_at,
            self.options.spacing_ms,
            self.options.expire_after_ms,
            spread=self.options.spread_until is not None,
            own_times=self.own_times,
        )

    async def begin(self) -> None:
        """Prepare the transaction for the first block."""
        self.quotas = await self.transaction.read_quotas(self.user_id)
        if self.options.spread_until is not None:
            await self.transaction.begin_spread()

    async def end(self) -> tuple[datetime | None, timedelta]:
        """Set the times if the batch is spread. Return when the last job is due, and the spacing.

        The time is None if no job was accepted.
        """
        until, last_due = self.options.spread_until, self.schedule.last_due
        if until is None:
            return last_due, self.options.spacing_ms * _MILLISECOND
        spread = Spread(self.begun.start_at, until, self.schedule.places)
        expire_after = self.options.expire_after_ms
        await self.transaction.spread(
            spread, None if expire_after is None else expire_after * _MILLISECOND
        )
        if spread.count:
            last_due = max(spread.last_due, last_due or spread.last_due)
        return last_due, spread.spacing

    async def add(self, block: ReadBlock) -> None:
        """Store one block.

        Raises:
            InvalidInput: the batch is refused.
            ResourceExhausted: USER_WAITING_JOBS_EXCEEDED: the batch alone is above the quota.
        """
        most = bounds.MAX_SHOWN_REJECTIONS
        if self.own_times is not None and self.options.mode is not BatchMode.STRICT:
            most = bounds.MAX_CHECKED_REJECTIONS
        self.rejections += block.rejections[: most - len(self.rejections)]
        if self.options.mode is BatchMode.STRICT and self.rejections:
            # The batch is refused anyway. Reading goes on only to report more rejections.
            if len(self.rejections) >= bounds.MAX_SHOWN_REJECTIONS:
                self.check()
            return
        rows = block.rows
        if self.options.test:
            rows = [row._replace(schedule_time=None) for row in rows]
        gone = await self.transaction.suppressed(self.user_id, [row.recipient for row in rows])
        if gone:
            rows = [row for row in rows if row.recipient not in gone]
        # The exact check is made at the end. This one only ends a hopeless upload early.
        refusal = self.quotas.exceeded(
            "waiting_jobs", self.user_id, 0, self.counts.accepted + len(rows)
        )
        if refusal is not None:
            raise refusal
        if rows:
            times = await self._times(rows)
            spread = self.options.spread_until is not None
            tags = [row.tags for row in rows if row.tags]
            self.row_labels |= any(each.labels for each in tags)
            tagged = bool(tags)
            lines_from = partial(self._lines, rows, times, tagged=tagged or spread)
            await self.transaction.copy_jobs(len(rows), lines_from, spread=spread, tagged=tagged)
        if block.rejections:
            await self.transaction.copy_rejections(
                format_rejections(some, self.begun.batch_id) for some in _parts(block.rejections)
            )
        self.counts = IntakeCounts(
            accepted=self.counts.accepted + len(rows),
            rejected=self.counts.rejected + len(block.rejections),
            duplicate=self.counts.duplicate + block.duplicates,
            suppressed=self.counts.suppressed + len(block.rows) - len(rows),
        )

    async def _times(self, rows: Sequence[JobRow]) -> list[str]:
        times: list[str] = []
        for some in _parts(rows):
            try:
                times += self.schedule.times(some)
            except OverflowError:
                raise InvalidInput.field(
                    "options.spacing",
                    "the last mails would be due after the year 9999",
                    reason="SPACING_INVALID",
                ) from None
            await next_part()
        return times

    def _lines(
        self, rows: Sequence[JobRow], times: Sequence[str], first_id: int, *, tagged: bool
    ) -> Iterator[bytes]:
        """Yield the rows in parts as COPY reads them, numbered from `first_id`."""
        for some, of_them in zip(_parts(rows), _parts(times), strict=True):
            yield format_jobs(
                some,
                of_them,
                first_id,
                self.begun.batch_id,
                self.options.sender_id,
                tags_of=self.user_id if tagged else None,
            )
            first_id += len(some)

    def check(self) -> None:
        """Check the batch after its last block.

        Raises:
            InvalidInput: ROW_REJECTED, NO_ROW_ACCEPTED.
        """
        if not self.rejections:
            return
        if self.options.mode is BatchMode.STRICT:
            raise refused_rows(
                "a row was rejected and the mode is STRICT", "ROW_REJECTED", self.rejections
            )
        counts = self.counts
        if not counts.accepted + counts.duplicate + counts.suppressed:
            raise refused_rows("every row was rejected", "NO_ROW_ACCEPTED", self.rejections)

    def record(
        self, counts: IntakeCounts, last_due: datetime | None, spacing: timedelta
    ) -> BatchRecord:
        """Return the batch as it is stored, or would be."""
        return unstored_batch(
            self.options,
            self.begun,
            counts,
            user_id=self.user_id,
            email_column=self.steps.reader.email_column,
            spacing=spacing,
            last_due=last_due,
        )

    def planned(self, record: BatchRecord, spacing: timedelta) -> Sequence[JobGroup]:
        """Return the mails of a batch that is only checked, for its forecast."""
        last = record.start_at + spacing * max(self.schedule.places - 1, 0)
        return planned_mails(
            self.own_times or OwnTimes(),
            record.accepted_count,
            record.start_at,
            last,
            record.expire_after_ms,
        )


def _parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for first in range(0, len(items), _FORMATTED_AT_ONCE):
        yield items[first : first + _FORMATTED_AT_ONCE]
