"""Imports suppressions: from parts or a file to blocks of addresses, and back to an answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from outbox.v1.suppression_service_pb2 import (
    ImportSuppressionsFileRequest,
    ImportSuppressionsRequest,
    ImportSuppressionsResponse,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.block_changes import BlockChange
from outbox_server.services.scheduler.changes import Changes, Made
from outbox_server.services.scheduler.servicers.calls import (
    check_file_type,
    errors_name,
)
from outbox_server.services.scheduler.servicers.import_requests import (
    ImportRequest,
    checked_import,
    import_part,
    import_parts,
    naming_own_fields,
    stopped_import,
)
from outbox_server.services.scheduler.servicers.uploads import file_pieces, out_of_order
from outbox_server.services.scheduler.storage.suppression_imports import suppress_all
from outbox_server.services.scheduler.suppressing import end_rest
from outbox_server.services.scheduler.suppression_imports import (
    ImportBlock,
    ImportReader,
    Part,
)
from outbox_server.shared import bounds
from outbox_server.shared.errors import (
    ResourceExhausted,
)
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.intake.option_mapping import to_rejections
from outbox_server.shared.intake.upload_rate import LeastRate
from outbox_server.shared.user_quotas import UserQuotas


class SuppressionImporter:
    """Suppresses the addresses of imports."""

    def __init__(
        self,
        engine: AsyncEngine,
        loader: HeadLoader,
        changes: Changes,
        *,
        quotas: UserQuotas,
        imports: ImportReader,
        least_rate: LeastRate,
    ) -> None:
        """`quotas` are the defaults."""
        self._engine = engine
        self._loader = loader
        self._changes = changes
        self._quotas = quotas
        self._imports = imports
        self._least_rate = least_rate

    async def import_parts(
        self, requests: AsyncIterator[ImportSuppressionsRequest]
    ) -> ImportSuppressionsResponse:
        """Suppress the addresses of a CSV in chunks, or of rows.

        Raises:
            AlreadyExists: REQUEST_ID_REUSED.
            InvalidInput: UPLOAD_OUT_OF_ORDER, a wrong option, or the CSV cannot be read.
            ResourceExhausted: USER_SUPPRESSIONS_EXCEEDED.
        """
        messages = self._least_rate.keep(aiter(requests))
        first = await anext(messages, None)
        if first is None:
            raise out_of_order("chunk", "one of `chunk` and `rows` must be set in a message")
        parts = import_parts(import_part(first), messages)
        # The request is kept for the audit log, and the part may be large.
        first.ClearField("part")
        with errors_name("chunk"):
            return await self._import(first, parts)

    async def import_file(
        self, requests: AsyncIterator[ImportSuppressionsFileRequest]
    ) -> ImportSuppressionsResponse:
        """Suppress the addresses of a CSV that is the body of an HTTP request.

        Raises:
            as `import_parts`; InvalidInput: FILE_TYPE_INVALID.
        """
        messages = self._least_rate.keep(aiter(requests))
        first = await anext(messages, None)
        if first is None:
            raise out_of_order("file", "must be set in the first message")
        check_file_type(first.file.content_type)
        parts = file_pieces(first.file.data, messages)
        first.ClearField("file")
        with errors_name("file"):
            return await self._import(first, parts)

    async def _import(
        self, first: ImportRequest, parts: AsyncIterator[Part]
    ) -> ImportSuppressionsResponse:
        user_id, options = checked_import(first)
        asked = self._changes.ask(first, user_id)
        change = BlockChange(self._engine, asked, ImportSuppressionsResponse, _add_counts)
        # The numbers of an import that was begun before are stored, the rejections are found again.
        rejected = ImportSuppressionsResponse()
        with naming_own_fields(bool(options.email_column)):
            async with aclosing(self._imports.blocks(parts, options)) as blocks:
                async for block in blocks:
                    await self._store(first, user_id, block, change)
                    rejected.rejected_count += len(block.rejections)
                    room = bounds.MAX_SHOWN_REJECTIONS - len(rejected.rejections)
                    rejected.rejections.extend(to_rejections(block.rejections[:room]))
        rejected.MergeFrom(await change.complete())
        return rejected

    async def _store(
        self,
        request: ImportRequest,
        user_id: str,
        block: ImportBlock,
        change: BlockChange[ImportSuppressionsResponse],
    ) -> None:
        """Store a block of an import."""

        async def store(
            connection: AsyncConnection,
        ) -> Made[ImportSuppressionsResponse]:
            created, part = await suppress_all(connection, user_id, block.reasons, self._quotas)

            def made(created: int, jobs: int) -> Made[ImportSuppressionsResponse]:
                return Made(
                    ImportSuppressionsResponse(
                        created_count=created,
                        existing_count=block.rows - created,
                        suppressed_job_count=jobs,
                    ),
                    "suppressions",
                    user_id,
                    after={"created_count": created, "suppressed_count": jobs},
                    changed=created > 0 or jobs > 0,
                    afterwards=afterwards,
                )

            async def record(connection: AsyncConnection, jobs: int) -> None:
                await self._changes.record_part(connection, request, made(0, jobs))

            async def afterwards() -> None:
                rest = await end_rest(self._engine, self._loader, part, record)
                change.later.suppressed_job_count += rest

            return made(created, part.ended.jobs)

        try:
            await change.make(block.content, store)
        except ResourceExhausted as error:
            raise stopped_import(error, change.total) from None


def _add_counts(
    total: ImportSuppressionsResponse,
    more: ImportSuppressionsResponse,
) -> None:
    total.created_count += more.created_count
    total.existing_count += more.existing_count
    total.suppressed_job_count += more.suppressed_job_count
