"""Shows mails before they are sent, built by the same code and within the same limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.scheduler.reading import ReaderSteps, refused_rows
from outbox_server.services.scheduler.storage.checking import CheckStore
from outbox_server.services.scheduler.storage.new_batches import IntakeSender
from outbox_server.services.scheduler.storage.previews import read_job_content
from outbox_server.shared.bounds import MAX_SHOWN_MAIL_BYTES
from outbox_server.shared.database.message_ids import message_id_for
from outbox_server.shared.errors import FailedPrecondition, InvalidInput
from outbox_server.shared.intake.batch_options import BatchOptions, under_options
from outbox_server.shared.intake.blocks import BlockReader, ReadBlock
from outbox_server.shared.intake.duplicates import DuplicateFinder
from outbox_server.shared.intake.payloads import Payload
from outbox_server.shared.intake.rows import JobRow, RowRejection
from outbox_server.shared.mail.content import BatchContent, read_unstored, request_of
from outbox_server.shared.mail.message import Message, wire_address
from outbox_server.shared.mail.worker import message_of
from outbox_server.shared.reading_turns import ReadingTurns
from outbox_server.shared.rpc.proto_mapping import id_text, not_found
from outbox_server.shared.sender_domains import check_sender_domain
from outbox_server.shared.states import DuplicatePolicy
from outbox_server.shared.templates.batch import RenderError
from outbox_server.shared.templates.remote import TemplateParser
from outbox_server.shared.templates.workers import TooCostlyError

# The maximum number of calls that may read a payload at once.
_THREADS: Final = 4


class Omission(Enum):
    """Why a row that is not rejected becomes no mail."""

    NO_ROW = auto()
    DUPLICATE = auto()
    SUPPRESSED = auto()


@dataclass(frozen=True, slots=True)
class ShownMail:
    """A mail as it is handed to the mail server, from the address `sender`."""

    sender: str
    message: Message


@dataclass(frozen=True, slots=True)
class Preview:
    """Rows of a batch by number, and the column from which the addresses were taken."""

    rows: Sequence[tuple[int, ShownMail | RowRejection | Omission]]
    email_column: str


_Row = JobRow | RowRejection | Omission


class _NotBuiltError(Exception):
    """A mail cannot be built, for `reason`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Previewer:
    """Builds mails in the worker processes of templates."""

    def __init__(
        self,
        engine: AsyncEngine,
        checks: CheckStore,
        templates: TemplateParser,
        read_installation_id: Callable[[], Awaitable[str]],
        *,
        turns: ReadingTurns,
        max_message_bytes: int,
        restrict_domains: bool,
        special_domains: bool,
    ) -> None:
        """With `restrict_domains`, senders need an address in a domain of their user.

        `special_domains` accepts addresses in domains of private networks.
        """
        self._engine = engine
        self._checks = checks
        self._templates = templates
        self._read_installation_id = read_installation_id
        self._turns = turns
        self._max_message_bytes = max_message_bytes
        self._restrict_domains = restrict_domains
        self._special_domains = special_domains
        self._installation_id = ""
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="preview")

    def close(self) -> None:
        """Free the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def installation_id(self) -> str:
        """Return the part that all Message-IDs of this installation share. It never changes."""
        if not self._installation_id:
            self._installation_id = await self._read_installation_id()
        return self._installation_id

    async def render_job(self, job_id: int, user_id: str | None) -> ShownMail:
        """Return the mail of a job as it would be sent now.

        Raises:
            NotFound: EMAIL_JOB_NOT_FOUND.
            FailedPrecondition: RECIPIENT_ERASED, MAIL_NOT_BUILT, MAIL_TOO_LARGE_TO_SHOW.
            ResourceExhausted, Unavailable: see `TemplateParser.parse`.
        """
        async with self._engine.connect() as connection:
            found = await read_job_content(connection, job_id, user_id)
        if found is None:
            raise not_found("email_job_id", id_text(job_id))
        if not found.recipient:
            raise FailedPrecondition(
                "this job's recipient was erased, so its mail cannot be built",
                reason="RECIPIENT_ERASED",
                metadata={"email_job_id": id_text(job_id)},
            )
        try:
            mail = await self._build(found.batch, job_id, found.recipient, found.variables)
        except _NotBuiltError as error:
            raise FailedPrecondition(
                f"the mail of this job cannot be built: {error.reason}: {error}",
                reason="MAIL_NOT_BUILT",
                metadata={"email_job_id": id_text(job_id), "cause": error.reason},
            ) from None
        _check_size([mail])
        return mail

    async def preview(
        self, options: BatchOptions, payload: Payload, numbers: Sequence[int], user_id: str | None
    ) -> Preview:
        """Return the rows with these numbers, or the first one that would become a mail.

        Raises:
            NotFound: SENDER_NOT_FOUND.
            InvalidInput: an option, a template or the payload is invalid; TEMPLATE_TOO_COSTLY.
            PermissionDenied: SENDER_DOMAIN_NOT_ALLOWED.
            FailedPrecondition: MAIL_TOO_LARGE_TO_SHOW.
            ResourceExhausted, Unavailable: see `TemplateParser.parse`.
        """
        sender = await self._sender(options, user_id)
        try:
            template = await self._templates.parse(
                sender.user_id, options.subject, options.body, options.html, options.head
            )
        except InvalidInput as error:
            raise under_options(error) from None
        # Duplicates are found here, because they are part of the answer.
        reader = BlockReader(
            payload,
            replace(options, duplicates=DuplicatePolicy.KEEP_ALL),
            self._max_message_bytes,
            special_domains=self._special_domains,
        )
        reader.use(template, template.renderer)
        steps = ReaderSteps(reader, self._threads, self._turns)
        keep_first = options.duplicates is DuplicatePolicy.KEEP_FIRST
        with DuplicateFinder() as finder:
            try:
                blocks = _Blocks(steps, finder if keep_first else None)
                if numbers:
                    rows = await self._numbered(blocks, sender.user_id, set(numbers))
                else:
                    rows = await self._first(blocks, sender.user_id)
            finally:
                await steps.end()
        async with self._engine.connect() as connection:
            content = await read_unstored(
                connection,
                sender.sender_id,
                subject=options.subject,
                body=options.body,
                html=options.html,
                variable_names=reader.variable_names,
                head=options.head,
            )
        if content is None:
            raise _no_sender(options)
        shown: list[tuple[int, ShownMail | RowRejection | Omission]] = []
        mails: list[ShownMail] = []
        for number in sorted(rows):
            row = await self._shown(content, rows[number])
            shown.append((number, row))
            if isinstance(row, ShownMail):
                mails.append(row)
                # Checked after each mail, because together they could have 20 times the size of the
                # largest mail.
                _check_size(mails)
        return Preview(shown, reader.email_column)

    async def _sender(self, options: BatchOptions, user_id: str | None) -> IntakeSender:
        found = await self._checks.look_up(options.sender_id, options.request_id, user_id)
        if found is None or found[0].deleted:
            raise _no_sender(options)
        sender, _ = found
        if self._restrict_domains:
            check_sender_domain(sender.email, sender.domains, sender.user_id)
        return sender

    async def _numbered(self, blocks: _Blocks, user: str, wanted: set[int]) -> dict[int, _Row]:
        found: dict[int, _Row] = dict.fromkeys(wanted, Omission.NO_ROW)
        while (block := await blocks.next()) is not None:
            found |= {number: block[number] for number in wanted & block.keys()}
            if max(block, default=0) >= max(wanted):
                break
        return await self._without_suppressed(found, user)

    async def _first(self, blocks: _Blocks, user: str) -> dict[int, _Row]:
        first: dict[int, _Row] = {}
        rejections: list[RowRejection] = []
        while (block := await blocks.next()) is not None:
            checked = await self._without_suppressed(block, user)
            for number, row in sorted(checked.items()):
                if isinstance(row, JobRow):
                    return {number: row}
                if isinstance(row, RowRejection):
                    rejections.append(row)
                else:
                    first = first or {number: row}
        if not first and rejections:
            raise refused_rows("every row was rejected", "NO_ROW_ACCEPTED", rejections)
        return first

    async def _without_suppressed(self, rows: dict[int, _Row], user: str) -> dict[int, _Row]:
        recipients = [row.recipient for row in rows.values() if isinstance(row, JobRow)]
        if not recipients:
            return rows
        async with self._checks.begin() as transaction:
            gone = await transaction.suppressed(user, recipients)
        return {
            number: (
                Omission.SUPPRESSED if isinstance(row, JobRow) and row.recipient in gone else row
            )
            for number, row in rows.items()
        }

    async def _shown(self, content: BatchContent, row: _Row) -> ShownMail | RowRejection | Omission:
        if not isinstance(row, JobRow):
            return row
        try:
            return await self._build(content, 0, row.recipient, row.variables)
        except _NotBuiltError as error:
            return RowRejection(row.row_number, "", error.reason, str(error))

    async def _build(
        self, content: BatchContent, job_id: int, recipient: str, variables: str | None
    ) -> ShownMail:
        installation = await self.installation_id()
        request = request_of(
            content,
            recipient=recipient,
            variables=variables,
            message_id=message_id_for(job_id, content.message_id_address, installation),
            max_bytes=self._max_message_bytes,
        )
        try:
            message, _ = await self._templates.try_to_run(
                content.user_id, "build", *request, decode=message_of
            )
        except RenderError as error:
            raise _NotBuiltError(error.reason, error.message) from None
        except TooCostlyError as error:
            raise _NotBuiltError("TEMPLATE_TOO_COSTLY", f"building this mail {error}") from None
        except InvalidInput as error:
            raise _NotBuiltError(error.reason, error.message) from None
        return ShownMail(wire_address(content.email), message)


class _Blocks:
    """The blocks of a payload as rows by number, with the duplicates."""

    def __init__(self, steps: ReaderSteps, finder: DuplicateFinder | None) -> None:
        """Without a `finder`, no row is a duplicate."""
        self._steps = steps
        self._finder = finder

    async def next(self) -> dict[int, _Row] | None:
        """Return the next block, or None after the last."""
        block = await self._steps.next()
        return None if block is None else await self._steps.run(partial(self._rows_of, block))

    def _rows_of(self, block: ReadBlock) -> dict[int, _Row]:
        new = [True] * len(block.rows)
        if self._finder is not None:
            new = list(self._finder.new_in_block([row.address_key for row in block.rows]))
        rows: dict[int, _Row] = {one.row_number: one for one in block.rejections}
        for row, is_new in zip(block.rows, new, strict=True):
            rows[row.row_number] = row if is_new else Omission.DUPLICATE
        return rows


def _check_size(mails: Sequence[ShownMail]) -> None:
    size = sum(len(mail.message.data) for mail in mails)
    if size > MAX_SHOWN_MAIL_BYTES:
        what = "the mail has" if len(mails) == 1 else f"the first {len(mails)} mails have"
        raise FailedPrecondition(
            f"{what} {size:,} bytes; an answer can have at most {MAX_SHOWN_MAIL_BYTES:,}",
            reason="MAIL_TOO_LARGE_TO_SHOW",
            metadata={"bytes": str(size), "most": str(MAX_SHOWN_MAIL_BYTES)},
        )


def _no_sender(options: BatchOptions) -> Exception:
    return not_found("sender_id", id_text(options.sender_id))
