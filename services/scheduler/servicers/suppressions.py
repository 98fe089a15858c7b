"""Implements SuppressionService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Final

from google.protobuf.empty_pb2 import Empty
from outbox.v1 import suppression_pb2, suppression_service_pb2, suppression_service_pb2_grpc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.changes import Changes, Made, check_etag
from outbox_server.services.scheduler.erasing import erase_recipient, forget_changes
from outbox_server.services.scheduler.senders import check_sender_address
from outbox_server.services.scheduler.servicers.calls import (
    Context,
    named_user,
)
from outbox_server.services.scheduler.servicers.importing import SuppressionImporter
from outbox_server.services.scheduler.storage import suppressions as storage
from outbox_server.services.scheduler.suppressing import end_rest
from outbox_server.services.scheduler.suppression_imports import ImportReader
from outbox_server.shared import bounds
from outbox_server.shared.callers import current_claimant, in_parts
from outbox_server.shared.errors import NotFound, Violations
from outbox_server.shared.fair_shares import FairShares
from outbox_server.shared.filters.fields import check_filter
from outbox_server.shared.filters.grammar import parse_filter
from outbox_server.shared.filters.resources import (
    SUPPRESSION_FIELDS,
    SUPPRESSION_ORDERS,
    checked_list,
)
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.intake.addresses import BadAddress, check_address
from outbox_server.shared.intake.upload_rate import LeastRate
from outbox_server.shared.quoting import quoted
from outbox_server.shared.rpc import page_tokens
from outbox_server.shared.rpc.paging import requested_page
from outbox_server.shared.rpc.proto_mapping import to_timestamp
from outbox_server.shared.user_quotas import UserQuotas

_EXPORT: Final = "exported suppressions"
_EXPORTED_AT_ONCE: Final = 1_000


class SuppressionServicer(suppression_service_pb2_grpc.SuppressionServiceServicer):
    """Manages the addresses to which a user's mail must never be sent."""

    def __init__(
        self,
        engine: AsyncEngine,
        loader: HeadLoader,
        changes: Changes,
        *,
        quotas: UserQuotas,
        imports: ImportReader,
        least_rate: LeastRate,
        export_reads: FairShares,
    ) -> None:
        """`quotas` are the defaults. `export_reads` has a place for each page that is read."""
        self._engine = engine
        self._loader = loader
        self._changes = changes
        self._quotas = quotas
        self._importer = SuppressionImporter(
            engine, loader, changes, quotas=quotas, imports=imports, least_rate=least_rate
        )
        self._export_reads = export_reads

    async def CreateSuppression(
        self,
        request: suppression_service_pb2.CreateSuppressionRequest,
        context: Context,
    ) -> suppression_pb2.Suppression:
        """Suppress an address, and end the waiting jobs to it."""
        asked = request.suppression
        wrong = Violations()
        user_id = wrong.value(lambda: named_user(request.user_id), "")
        address = wrong.value(lambda: check_sender_address("suppression.email", asked.email), "")
        reason = wrong.value(
            lambda: bounds.SUPPRESSION_REASON.check("suppression.reason", asked.reason), ""
        )
        wrong.raise_any()

        async def create(connection: AsyncConnection) -> Made[suppression_pb2.Suppression]:
            created, part = await storage.insert_suppression(
                connection, user_id, address, reason, self._quotas
            )

            def made(jobs: int) -> Made[suppression_pb2.Suppression]:
                return Made(
                    _to_suppression(created),
                    _target(created),
                    user_id,
                    after={"reason": created.reason, "suppressed_count": jobs},
                    address=address,
                    afterwards=afterwards,
                )

            async def record(connection: AsyncConnection, jobs: int) -> None:
                await self._changes.record_part(connection, request, made(jobs))

            async def afterwards() -> None:
                await end_rest(self._engine, self._loader, part, record)

            return made(part.ended.jobs)

        return await self._changes.make(request, user_id, suppression_pb2.Suppression, create)

    async def DeleteSuppression(
        self,
        request: suppression_service_pb2.DeleteSuppressionRequest,
        context: Context,
    ) -> Empty:
        """Delete a suppression. Mail may be sent to the address again."""
        user_id = named_user(request.user_id)
        try:
            address = check_address(request.email)
        except BadAddress:
            # Only valid addresses can be suppressed.
            raise _not_found(request.email) from None

        async def delete(connection: AsyncConnection) -> Made[Empty]:
            present = await storage.read_suppression(connection, user_id, address, lock=True)
            if present is None:
                raise _not_found(request.email)
            check_etag(request.etag, _etag(present), "this suppression")
            await storage.delete_suppression(connection, user_id, address)
            before = {"reason": present.reason, "create_time": present.created_at.isoformat()}
            return Made(Empty(), f"suppressions/{address}", user_id, before=before, address=address)

        return await self._changes.make(request, user_id, Empty, delete)

    async def GetSuppression(
        self,
        request: suppression_service_pb2.GetSuppressionRequest,
        context: Context,
    ) -> suppression_pb2.Suppression:
        """Return the suppression of one address."""
        user_id = named_user(request.user_id)
        try:
            address = check_address(request.email)
        except BadAddress:
            # Only valid addresses can be suppressed.
            raise _not_found(request.email) from None
        async with self._engine.connect() as connection:
            found = await storage.read_suppression(connection, user_id, address)
        if found is None:
            raise _not_found(request.email)
        return _to_suppression(found)

    async def ImportSuppressions(
        self,
        request_iterator: AsyncIterator[suppression_service_pb2.ImportSuppressionsRequest],
        context: Context,
    ) -> suppression_service_pb2.ImportSuppressionsResponse:
        """Suppress many addresses."""
        return await self._importer.import_parts(request_iterator)

    async def ImportSuppressionsFile(
        self,
        request_iterator: AsyncIterator[suppression_service_pb2.ImportSuppressionsFileRequest],
        context: Context,
    ) -> suppression_service_pb2.ImportSuppressionsResponse:
        """Suppress the addresses of a CSV that is the body of an HTTP request."""
        return await self._importer.import_file(request_iterator)

    async def ExportSuppressions(
        self,
        request: suppression_service_pb2.ExportSuppressionsRequest,
        context: Context,
    ) -> AsyncIterator[suppression_service_pb2.ExportSuppressionsResponse]:
        """Stream the user's suppressions."""
        wrong = Violations()
        user_id = wrong.value(lambda: named_user(request.user_id), "")
        tree = wrong.value(
            lambda: check_filter(parse_filter(request.filter), SUPPRESSION_FIELDS), None
        )
        wrong.raise_any()
        stream = page_tokens.digest_filters(user_id, request.filter)
        place = page_tokens.decode_resume(request.resume_token, _EXPORT, stream)
        after: str | None = str(place[0]) if place else ""
        while after is not None:
            async with (
                self._export_reads.entered(current_claimant()),
                self._engine.connect() as connection,
            ):
                found, reached = await storage.list_suppressions(
                    connection, user_id, tree, after, _EXPORTED_AT_ONCE, descending=False
                )
            after = found[-1].address if len(found) == _EXPORTED_AT_ONCE else reached
            yield suppression_service_pb2.ExportSuppressionsResponse(
                suppressions=await in_parts(found, _to_suppression),
                resume_token="" if after is None else page_tokens.encode(_EXPORT, stream, (after,)),
            )

    async def ListSuppressions(
        self,
        request: suppression_service_pb2.ListSuppressionsRequest,
        context: Context,
    ) -> suppression_service_pb2.ListSuppressionsResponse:
        """Return one page of a user's suppressions."""
        wrong = Violations()
        user_id = wrong.value(lambda: named_user(request.user_id), "")
        tree, descending = checked_list(request, SUPPRESSION_FIELDS, SUPPRESSION_ORDERS, wrong)
        wrong.raise_any()
        page = requested_page(request, "suppressions", user_id, start=("",))
        async with self._engine.connect() as connection:
            found, reached = await storage.list_suppressions(
                connection, user_id, tree, *page.after, page.limit, descending=descending
            )
        shown, token = page.cut(
            found,
            lambda suppression: (suppression.address,),
            None if reached is None else (reached,),
        )
        return suppression_service_pb2.ListSuppressionsResponse(
            suppressions=await in_parts(shown, _to_suppression), next_page_token=token
        )

    async def EraseRecipient(
        self,
        request: suppression_service_pb2.EraseRecipientRequest,
        context: Context,
    ) -> suppression_service_pb2.EraseRecipientResponse:
        """Erase what is stored about one recipient."""
        wrong = Violations()
        user_id = wrong.value(lambda: named_user(request.user_id), "")
        address = wrong.value(lambda: check_sender_address("email", request.email), "")
        wrong.raise_any()

        async def erase() -> Made[suppression_service_pb2.EraseRecipientResponse]:
            erased = await erase_recipient(self._engine, self._loader, user_id, address)
            answer = suppression_service_pb2.EraseRecipientResponse(
                suppression=_to_suppression(erased.suppression),
                suppressed_count=erased.suppressed,
                erased_count=erased.erased,
                rejection_count=erased.rejections,
                in_flight_count=erased.in_flight,
            )
            # The event and the stored request have only the hash.
            return Made(
                answer,
                _target(erased.suppression),
                user_id,
                after={"erased_count": erased.erased, "in_flight_count": erased.in_flight},
                # The caller's own words about this change may name the address.
                afterwards=partial(forget_changes, self._engine, user_id, address),
            )

        return await self._changes.make_in_parts(
            request, user_id, suppression_service_pb2.EraseRecipientResponse, erase
        )


def _to_suppression(record: storage.SuppressionRecord) -> suppression_pb2.Suppression:
    return suppression_pb2.Suppression(
        user_id=record.user_id,
        email=record.address,
        reason=record.reason,
        create_time=to_timestamp(record.created_at),
        etag=_etag(record),
    )


def _etag(record: storage.SuppressionRecord) -> str:
    # A suppression never changes: it is deleted and created again.
    return str(to_timestamp(record.created_at).ToMicroseconds())


def _target(record: storage.SuppressionRecord) -> str:
    return f"suppressions/{record.address}"


def _not_found(email: str) -> NotFound:
    return NotFound(
        f"{quoted(email)} is not suppressed",
        reason="SUPPRESSION_NOT_FOUND",
        metadata={"email": email},
    )
