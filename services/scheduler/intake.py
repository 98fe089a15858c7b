"""Accepts a batch, whole or not at all, once per `request_id`.

A thread parses and checks the next block of rows while the event loop stores the previous one. All
blocks are stored in one transaction. It begins when the first block has been read, so that a slow
upload of few rows holds no connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final

import structlog

from outbox_server.services.scheduler.batch_writer import BatchWriter
from outbox_server.services.scheduler.forecasts import BatchForecast, QuickForecaster
from outbox_server.services.scheduler.group_commit import GroupCommit
from outbox_server.services.scheduler.metrics import SchedulerMetrics
from outbox_server.services.scheduler.planning import OwnTimes
from outbox_server.services.scheduler.reading import ReaderSteps
from outbox_server.services.scheduler.small_batches import SmallBatch, read_small
from outbox_server.services.scheduler.storage.batches import BatchRecord, accepted_change
from outbox_server.services.scheduler.storage.checking import CheckStore
from outbox_server.services.scheduler.storage.intake import IntakeStore
from outbox_server.services.scheduler.storage.new_batches import IntakeSender, KnownRequest
from outbox_server.shared.callers import current_claimant, leave_place, take_turn
from outbox_server.shared.database.audit_events import RecordedChange
from outbox_server.shared.database.ownership import owner_of
from outbox_server.shared.errors import AlreadyExists, FailedPrecondition, InvalidInput
from outbox_server.shared.fair_shares import FairShares
from outbox_server.shared.forecast.simulation import JobGroup
from outbox_server.shared.intake.batch_options import (
    BatchOptions,
    check_spread,
    under_options,
)
from outbox_server.shared.intake.blocks import BlockReader
from outbox_server.shared.intake.payloads import Payload
from outbox_server.shared.intake.rows import RowRejection
from outbox_server.shared.reading_turns import ReadingTurns
from outbox_server.shared.rpc.proto_mapping import id_text, not_found
from outbox_server.shared.sender_domains import check_sender_domain
from outbox_server.shared.templates.remote import TemplateParser

# The maximum number of uploads in progress. Each holds a block of rows (at most 4 Mi characters)
# and the chunk that it came from (4 MiB), and the next block too while a block is stored. Its
# thread waits for the caller most of the time.
_UPLOADS: Final = 16
# The maximum number of batches of one message (at most 5 MiB) that are read at once. Reading uses
# the CPU, so more at once would not be faster.
_BATCHES: Final = 4
# The maximum number of small batches that wait for their group to be written. They hold none of the
# places above, because each needs at most 64 KiB.
_GROUPED: Final = 256
# The maximum number of calls that wait for a place. They wait before their first message is
# received, so they use no memory.
_WAITING: Final = 500
# How long an intake waits for a transaction while other intakes are stored.
_STORE_PATIENCE: Final = timedelta(seconds=30)
# A rollback is quick. One that takes longer must not delay the end of the process.
_END_LIMIT: Final = timedelta(seconds=5)
_NOT_STORED: Final = (
    "{} rejections are counted but not stored: the user has as many stored rejections as the quota "
    "allows."
)
_NOT_LOADED: Final = (
    "The queue cannot be loaded at the moment: the batch is accepted, and sending starts as soon "
    "as it can."
)


_log = structlog.get_logger("outbox.intake")


@dataclass(frozen=True, slots=True)
class Acceptance:
    """An accepted batch; or one that was only checked, which has the id 0."""

    batch_id: int
    user_id: str
    # The first rejections.
    rejections: Sequence[RowRejection] = ()
    replayed: bool = False
    notices: Sequence[str] = ()
    # The stored batch and its forecast, if they are known already.
    record: BatchRecord | None = None
    forecast: BatchForecast | None = None
    # The mails of a batch that was only checked.
    planned: Sequence[JobGroup] = ()


class Intake:
    """Accepts batches. `load` loads the head of a sender, and returns whether it succeeded."""

    def __init__(
        self,
        store: IntakeStore,
        groups: GroupCommit,
        load: Callable[[int], Awaitable[bool]],
        forecaster: QuickForecaster,
        templates: TemplateParser,
        *,
        turns: ReadingTurns,
        checks: CheckStore,
        max_message_bytes: int,
        most_open: int,
        restrict_domains: bool = False,
        special_domains: bool = True,
        metrics: SchedulerMetrics | None = None,
        trace_parent: Callable[[], str | None] | None = None,
    ) -> None:
        """Check batches by `checks`, and store them by `store`.

        Allow at most `most_open` transactions at a time, because other calls need connections.

        Half of them are for uploads and half for batches of one message, so that those do not wait
        for slow uploads. With `restrict_domains`, senders need an address in a domain of their
        user. `special_domains` accepts addresses in domains of private networks. `trace_parent`
        returns the span of the current call, for the trace of the sends; None means that there are
        no traces.
        """
        self.batches = FairShares("batches", _BATCHES, waiting=_WAITING)
        self.uploads = FairShares("uploads", _UPLOADS, waiting=_WAITING)
        self._grouped = FairShares("small batches", _GROUPED, waiting=_WAITING)
        self._metrics = metrics or SchedulerMetrics()
        self._trace_parent = trace_parent
        self._store = store
        self._checks = checks
        self._groups = groups
        self._forecaster = forecaster
        self._load = load
        self._templates = templates
        self._turns = turns
        self._max_message_bytes = max_message_bytes
        self._restrict_domains = restrict_domains
        self._special_domains = special_domains
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        each = max(most_open // 2, 1)
        self._places = {
            waits: FairShares("intakes", each, waiting=_UPLOADS, patience=_STORE_PATIENCE)
            for waits in (False, True)
        }
        self._threads = {
            waits: ThreadPoolExecutor(count, thread_name_prefix=f"intake-{name}")
            for waits, count, name in ((False, _BATCHES, "batch"), (True, _UPLOADS, "upload"))
        }

    async def close(self) -> None:
        """Wait until interrupted intakes have rolled back, and free the threads."""
        await self._groups.close()
        try:
            async with asyncio.timeout(_END_LIMIT.total_seconds()):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("intake_not_ended", under_way=self._under_way)
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)

    async def accept_small(
        self,
        options: BatchOptions,
        payload: Callable[[], Payload],
        user_id: str | None,
        change: RecordedChange,
    ) -> Acceptance:
        """Do the same as `accept` with a small batch, together with other calls.

        `payload` returns the payload each time. Raises as `accept` does.
        """
        small = self._read_small(options, payload())
        if small is None:
            return await self.accept(options, payload(), user_id, change)
        claimant = current_claimant()
        async with self._grouped.entered(claimant):
            leave_place()
            parent = None if self._trace_parent is None else self._trace_parent()
            stored = await self._groups.store(small, user_id, claimant, change, parent)
        if stored is None:
            async with self.batches.entered(claimant):
                return await self.accept(options, payload(), user_id, change)
        # The statements of the group belong to no call. The statements that follow belong to this
        # call.
        owner_of(stored.sender.user_id)
        if stored.known is not None:
            return _replayed(stored.known, options, small.digest, stored.sender)
        if stored.record is None:
            raise RuntimeError("a stored batch has no record")
        self._metrics.accepted(jobs=stored.record.accepted_count, rejected=0)
        reading = self._forecaster.begin(stored.record)
        done = True if stored.loaded is None else await asyncio.shield(stored.loaded)
        notices = () if done else (_NOT_LOADED,)
        await asyncio.shield(reading)
        # All calls of the group get here at once.
        await take_turn()
        return Acceptance(
            stored.record.batch_id,
            stored.sender.user_id,
            notices=notices,
            record=stored.record,
            forecast=await self._forecaster.end(stored.record, reading),
        )

    def _read_small(self, options: BatchOptions, payload: Payload) -> SmallBatch | None:
        template = self._templates.known(options.subject, options.body, options.html, options.head)
        if template is None:
            return None
        return read_small(
            options,
            payload,
            template,
            self._max_message_bytes,
            special_domains=self._special_domains,
        )

    async def accept(
        self,
        options: BatchOptions,
        payload: Payload,
        user_id: str | None,
        change: RecordedChange,
        *,
        validate_only: bool = False,
    ) -> Acceptance:
        """Store the batch and load its sender's head. With `validate_only`, only check it.

        `change` says who asks for it, for the audit log.

        Raises:
            NotFound: SENDER_NOT_FOUND.
            AlreadyExists: REQUEST_ID_REUSED.
            InvalidInput: the payload or a template is invalid; TEMPLATE_TOO_COSTLY, ROW_REJECTED,
                NO_ROW_ACCEPTED, SPACING_INVALID, SPREAD_UNTIL_INVALID.
            Unavailable: UPLOAD_STALLED, REQUEST_IN_PROGRESS, TEMPLATE_WORKER_UNAVAILABLE.
            ResourceExhausted: TOO_MANY_CALLS, USER_WAITING_JOBS_EXCEEDED.
            PermissionDenied: SENDER_DOMAIN_NOT_ALLOWED.
        """
        reader = BlockReader(
            payload,
            options,
            self._max_message_bytes,
            special_domains=self._special_domains,
        )
        steps = ReaderSteps(reader, self._threads[reader.waits], self._turns)
        self._under_way += 1
        self._idle.clear()
        try:
            return await self._accept(options, steps, user_id, change, validate_only=validate_only)
        finally:
            await steps.end()
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def _accept(
        self,
        options: BatchOptions,
        steps: ReaderSteps,
        user_id: str | None,
        change: RecordedChange,
        *,
        validate_only: bool,
    ) -> Acceptance:
        sender, known = await self._look_up(options, user_id)
        if known is None:
            if sender.deleted:
                raise _no_sender(options)
            if self._restrict_domains:
                check_sender_domain(sender.email, sender.domains, sender.user_id)
            done = await self._store_batch(
                options, steps, sender, change, validate_only=validate_only
            )
            if done is not None:
                if validate_only:
                    return done
                if not await self._load(sender.sender_id):
                    done = replace(done, notices=[*done.notices, _NOT_LOADED])
                return done
            # Another call with the same request_id has stored its batch first.
            sender, known = await self._look_up(options, user_id)
        return await _replay(known, options, steps, sender)

    async def _look_up(
        self, options: BatchOptions, user_id: str | None
    ) -> tuple[IntakeSender, KnownRequest | None]:
        found = await self._store.look_up(options.sender_id, options.request_id, user_id)
        if found is None:
            raise _no_sender(options)
        return found

    async def _store_batch(
        self,
        options: BatchOptions,
        steps: ReaderSteps,
        sender: IntakeSender,
        change: RecordedChange,
        *,
        validate_only: bool,
    ) -> Acceptance | None:
        """Store the batch. Return None if a batch with this `request_id` exists already."""
        try:
            template = await self._templates.parse(
                sender.user_id, options.subject, options.body, options.html, options.head
            )
        except InvalidInput as error:
            raise under_options(error) from None
        steps.reader.use(template, template.renderer)
        block = await steps.next()
        place = self._places[steps.reader.waits].entered(current_claimant())
        store = self._checks if validate_only else self._store
        async with place, store.begin() as transaction:
            begun = await transaction.insert_batch(
                options,
                sender.user_id,
                steps.reader.variable_names,
                steps.reader.email_column,
                None if self._trace_parent is None else self._trace_parent(),
            )
            if begun is None:
                return None
            check_spread(options, begun.start_at)
            writer = BatchWriter(
                transaction,
                begun,
                options,
                sender.user_id,
                steps,
                own_times=OwnTimes() if validate_only else None,
            )
            await writer.begin()
            while block is not None:
                steps.prefetch()
                await writer.add(block)
                block = await steps.next()
            writer.check()
            if options.test and not writer.counts.accepted:
                raise recipient_suppressed()
            last_due, spacing = await writer.end()
            finished = await transaction.finish(
                begun,
                sender,
                writer.counts,
                last_due=last_due,
                spacing=spacing,
                request_hash=steps.reader.digest(),
                quotas=writer.quotas,
                row_labels=writer.row_labels,
            )
            if finished is None:
                raise _no_sender(options)
            batch = writer.record(finished.counts, last_due, spacing)
            await transaction.record(accepted_change(change, batch))
        counts = finished.counts
        notices = [_NOT_STORED.format(finished.dropped)] if finished.dropped else ()
        if validate_only:
            return Acceptance(
                begun.batch_id,
                sender.user_id,
                writer.rejections,
                notices=notices,
                record=batch,
                planned=writer.planned(batch, spacing),
            )
        self._metrics.accepted(jobs=counts.accepted, rejected=counts.rejected)
        return Acceptance(begun.batch_id, sender.user_id, writer.rejections, notices=notices)


async def _replay(
    known: KnownRequest | None, options: BatchOptions, steps: ReaderSteps, sender: IntakeSender
) -> Acceptance:
    return _replayed(known, options, await steps.run(steps.reader.drain), sender)


def _replayed(
    known: KnownRequest | None, options: BatchOptions, digest: bytes, sender: IntakeSender
) -> Acceptance:
    if known is None or known.request_hash != digest:
        raise AlreadyExists(
            f"request_id {options.request_id!r} was used for another batch; "
            "use a new one for each batch",
            reason="REQUEST_ID_REUSED",
            metadata={"request_id": options.request_id},
        )
    return Acceptance(known.batch_id, sender.user_id, replayed=True)


def recipient_suppressed() -> FailedPrecondition:
    """Return the error of a test mail to a suppressed address."""
    return FailedPrecondition(
        "the recipient's address is suppressed, so nothing is sent to it; delete the suppression, "
        "or use another address",
        reason="RECIPIENT_SUPPRESSED",
    )


def _no_sender(options: BatchOptions) -> Exception:
    return not_found("sender_id", id_text(options.sender_id))
