"""Implements SenderService."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final

import structlog
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from outbox.v1 import sender_pb2, sender_service_pb2, sender_service_pb2_grpc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.changes import (
    Changes,
    Made,
    check_etag,
    differences,
)
from outbox_server.services.scheduler.effective_limits import (
    OwnLimits,
    UserOverrides,
    effective_limits,
)
from outbox_server.services.scheduler.pausing import check_pause_end
from outbox_server.services.scheduler.servicers.calls import (
    Context,
    acting_user,
    check_unchangeable,
    named_user,
    requested_pause_end,
)
from outbox_server.services.scheduler.servicers.sender_fields import UNCHANGEABLE, SenderFields
from outbox_server.services.scheduler.servicers.sender_mapping import (
    audited,
    etag_of,
    to_effective_limits,
    to_sender,
    to_verification,
    without_certificates,
)
from outbox_server.services.scheduler.storage import senders as storage
from outbox_server.services.scheduler.storage.access import read_time
from outbox_server.services.scheduler.storage.users import read_user
from outbox_server.services.scheduler.verifying import Verifier
from outbox_server.shared.callers import CallerKind, current_caller
from outbox_server.shared.cooldowns.record import CooldownRecord
from outbox_server.shared.errors import FailedPrecondition, Violations
from outbox_server.shared.filters.fields import FieldTest, both
from outbox_server.shared.filters.resources import (
    SENDER_FIELDS,
    SENDER_ORDERS,
    checked_list,
)
from outbox_server.shared.heads.loader import HeadLoader, load_soon
from outbox_server.shared.id_source import IdSource
from outbox_server.shared.queue.connection import QUEUE_ERRORS
from outbox_server.shared.queue.user_limits import UserSendLimits
from outbox_server.shared.quotas.storage import lock_and_check_senders, read_domains
from outbox_server.shared.rpc import page_tokens
from outbox_server.shared.rpc.paging import requested_page
from outbox_server.shared.rpc.proto_mapping import not_found, parse_id
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.sender_domains import check_sender_domain
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import SenderState, requested_enum
from outbox_server.shared.user_quotas import UserQuotas

# How long GetSender waits for Redis.
_PACE_LIMIT_S: Final = 0.5
_log = structlog.get_logger("outbox.senders")


class SenderServicer(sender_service_pb2_grpc.SenderServiceServicer):
    """Manages senders, and verifies their endpoints."""

    def __init__(
        self,
        engine: AsyncEngine,
        loader: HeadLoader,
        secrets: SecretBox,
        settings: Settings,
        verifier: Verifier,
        *,
        changes: Changes,
        wake_sweeper: Callable[[], None] = lambda: None,
        ids: IdSource | None = None,
    ) -> None:
        """`wake_sweeper` is called after jobs were cancelled, whose rows are to be updated."""
        self._wake_sweeper = wake_sweeper
        self._ids = ids or IdSource()
        self._changes = changes
        self._engine = engine
        self._loader = loader
        self.verifier = verifier
        self._settings = settings
        self._quotas = UserQuotas.from_settings(settings)
        self._fields = SenderFields(settings, secrets, verifier.egress.ports)

    async def CreateSender(
        self,
        request: sender_service_pb2.CreateSenderRequest,
        context: Context,
    ) -> sender_pb2.Sender:
        """Create a sender."""
        wrong = Violations()
        user_id = wrong.value(lambda: named_user(request.user_id), "")
        values = wrong.value(lambda: self._fields.columns_of(request.sender), dict[str, Any]())
        wrong.raise_any()

        async def create(connection: AsyncConnection) -> Made[sender_pb2.Sender]:
            await lock_and_check_senders(connection, user_id, self._quotas)
            await self._check_domain(connection, user_id, values)
            created = await storage.insert_sender(connection, self._ids, user_id, values)
            made = self._made(created, after=audited(self._answer(created)))
            if request.validate_only:
                made.answer.ClearField("sender_id")
                made.answer.ClearField("etag")
            return made

        return await self._make(request, user_id, create, validate_only=request.validate_only)

    async def GetSender(
        self,
        request: sender_service_pb2.GetSenderRequest,
        context: Context,
    ) -> sender_pb2.Sender:
        """Return one sender."""
        user_id = acting_user(request.user_id)
        sender_id = parse_id(request.sender_id, "sender_id")
        async with self._engine.connect() as connection:
            found = await storage.read_sender(connection, sender_id, user_id)
            if found is None:
                raise not_found("sender_id", request.sender_id)
            user = await read_user(connection, found.user_id)
        answer = self._answer(found)
        effective = effective_limits(
            OwnLimits(
                found.hourly_limit,
                found.min_gap_ms,
                found.max_in_flight,
                cools=found.cooldown is not None,
            ),
            UserOverrides(user.hourly_limit, user.min_gap_ms),
            UserSendLimits.from_settings(self._settings),
            floor=self._settings.min_gap,
            pace=await self._read_pace(sender_id),
        )
        answer.effective_limits.CopyFrom(to_effective_limits(effective, found.cooldown))
        return answer

    async def _read_pace(self, sender_id: int) -> timedelta | None:
        """Return the pace that a mail server's complaints have caused; None without Redis."""
        try:
            async with asyncio.timeout(_PACE_LIMIT_S):
                queue = (await self._loader.find_queues([sender_id]))[sender_id]
                state = await queue.read_limiter(sender_id)
        except (*QUEUE_ERRORS, TimeoutError):
            return None
        return timedelta(0) if state is None else state.pace

    async def ListSenders(
        self,
        request: sender_service_pb2.ListSendersRequest,
        context: Context,
    ) -> sender_service_pb2.ListSendersResponse:
        """Return one page of a user's senders."""
        wrong = Violations()
        user_id = wrong.value(lambda: named_user(request.user_id), "")
        tree, descending = checked_list(request, SENDER_FIELDS, SENDER_ORDERS, wrong)
        state = wrong.value(lambda: requested_enum(SenderState, request.state, "state"), None)
        wrong.raise_any()
        if state is not None:
            tree = both(tree, FieldTest("state", "=", int(state)))
        start = (page_tokens.MAX_ID if descending else 0,)
        page = requested_page(request, "senders", user_id, request.state, start=start)
        async with self._engine.connect() as connection:
            found, reached = await storage.list_senders(
                connection, user_id, tree, *page.after, page.limit, descending=descending
            )
        shown, token = page.cut(
            found, lambda sender: (sender.sender_id,), None if reached is None else (reached,)
        )
        return sender_service_pb2.ListSendersResponse(
            senders=[self._answer(sender) for sender in shown], next_page_token=token
        )

    async def UpdateSender(
        self,
        request: sender_service_pb2.UpdateSenderRequest,
        context: Context,
    ) -> sender_pb2.Sender:
        """Change some fields of a sender."""
        asked = request.sender
        mask = request.update_mask if request.HasField("update_mask") else None
        wrong = Violations()
        user_id = wrong.value(lambda: acting_user(request.user_id), None)
        sender_id = wrong.value(lambda: parse_id(asked.sender_id, "sender.sender_id"), 0)
        fields = wrong.value(lambda: tuple(self._fields.masked(asked, mask)), ())
        values = wrong.value(lambda: self._fields.columns_of(asked, fields), dict[str, Any]())
        wrong.raise_any()

        async def update(connection: AsyncConnection) -> Made[sender_pb2.Sender]:
            before = await self._locked(connection, asked.sender_id, user_id, asked.etag)
            if mask is None or list(mask.paths) in ([], ["*"]):
                check_unchangeable(asked, self._answer(before), "sender", UNCHANGEABLE)
            if not values:
                return self._made(before, changed=False)
            await self._check_domain(connection, before.user_id, values)
            change = await storage.update_sender(connection, sender_id, user_id, values)
            made = self._changed(before, change, "UpdateSender", frozenset(fields))
            if request.validate_only and made.changed:
                made.answer.ClearField("etag")
            return made

        return await self._make(request, user_id, update, validate_only=request.validate_only)

    async def DeleteSender(
        self,
        request: sender_service_pb2.DeleteSenderRequest,
        context: Context,
    ) -> Empty:
        """Delete a sender; its history stays."""
        user_id = acting_user(request.user_id)

        async def delete(connection: AsyncConnection) -> Made[Empty]:
            before = await self._locked(connection, request.sender_id, user_id, request.etag)
            deletion = await storage.delete_sender(connection, before, force=request.force)
            if not deletion.deleted:
                raise FailedPrecondition(
                    "this sender has jobs that wait or are being sent; cancel them, wait until "
                    "they end, or set `force`",
                    reason="SENDER_HAS_OPEN_JOBS",
                    metadata={"sender_id": request.sender_id},
                )

            async def afterwards() -> None:
                self._wake_sweeper()
                _log_ended(before.sender_id, deletion.ended, by="DeleteSender")
                await load_soon(self._loader, [before.sender_id])

            return Made(
                Empty(),
                _target(before),
                before.user_id,
                before=audited(self._answer(before)),
                afterwards=afterwards,
            )

        return await self._changes.make(request, user_id, Empty, delete)

    async def PauseSender(
        self,
        request: sender_service_pb2.PauseSenderRequest,
        context: Context,
    ) -> sender_pb2.Sender:
        """Pause a sender."""
        until = requested_pause_end(request)
        return await self._set_state(request, SenderState.PAUSED, until)

    async def ResumeSender(
        self,
        request: sender_service_pb2.ResumeSenderRequest,
        context: Context,
    ) -> sender_pb2.Sender:
        """End the pause and the cooldown of a sender."""
        return await self._set_state(request, SenderState.ACTIVE)

    async def VerifySender(
        self,
        request: sender_service_pb2.VerifySenderRequest,
        context: Context,
    ) -> sender_service_pb2.VerifySenderResponse:
        """Check that a sender's endpoint accepts mail."""
        recipient = request.recipient
        if recipient:
            recipient = self._fields.address("recipient", recipient)
        user_id = acting_user(request.user_id)
        sender_id = parse_id(request.sender_id, "sender_id")
        async with self._engine.connect() as connection:
            found = await storage.read_endpoint(connection, sender_id, user_id)
        if found is None:
            raise not_found("sender_id", request.sender_id)
        address, endpoint = found
        with self.verifier.turn_of(user_id):
            result = await self.verifier.verify(endpoint, address, recipient)
        if result.operators and current_caller().kind is CallerKind.USER:
            # The relay may be in the operator's network, which users must not learn about.
            result = replace(result, host="", port=0)
        return to_verification(result)

    async def _set_state(
        self,
        request: sender_service_pb2.PauseSenderRequest | sender_service_pb2.ResumeSenderRequest,
        state: SenderState,
        until: datetime | None = None,
    ) -> sender_pb2.Sender:
        user_id = acting_user(request.user_id)

        async def set_state(connection: AsyncConnection) -> Made[sender_pb2.Sender]:
            before = await self._locked(connection, request.sender_id, user_id, request.etag)
            if until is not None:
                check_pause_end(until, await read_time(connection))
            change = await storage.set_state(connection, before, state, until)
            return self._changed(before, change, "ResumeSender")

        return await self._make(request, user_id, set_state)

    async def _locked(
        self, connection: AsyncConnection, id_in_request: str, user_id: str | None, etag: str
    ) -> storage.SenderRecord:
        """Lock the sender that a call is about.

        Raises:
            NotFound: SENDER_NOT_FOUND.
            Aborted: ETAG_MISMATCH.
        """
        sender_id = parse_id(id_in_request, "sender_id")
        found = await storage.lock_sender(connection, sender_id, user_id)
        if found is None:
            raise not_found("sender_id", id_in_request)
        check_etag(etag, etag_of(found), "this sender")
        return found

    def _changed(
        self,
        before: storage.SenderRecord,
        change: storage.SenderChange,
        by: str,
        named: frozenset[str] = frozenset(),
    ) -> Made[sender_pb2.Sender]:
        """Return what the caller and the audit log learn of a change. `named` are its fields."""
        after = change.sender
        if after is None:
            raise AssertionError("a locked sender has disappeared")
        sender_id = before.sender_id

        async def afterwards() -> None:
            if change.changed:
                _log_ended(sender_id, change.ended, by=by)
                await load_soon(self._loader, [sender_id])

        was, became = differences(
            audited(self._answer(before)), audited(self._answer(after)), named
        )
        return self._made(
            after, before=was, after=became, changed=change.changed, afterwards=afterwards
        )

    def _made(self, record: storage.SenderRecord, **how: Any) -> Made[sender_pb2.Sender]:
        answer = self._answer(record)
        stored = without_certificates(answer)
        return Made(answer, _target(record), record.user_id, stored=stored, **how)

    async def _make(
        self,
        request: Message,
        user_id: str | None,
        change: Callable[[AsyncConnection], Awaitable[Made[sender_pb2.Sender]]],
        *,
        validate_only: bool = False,
    ) -> sender_pb2.Sender:
        """Make a change whose answer is a sender."""

        async def complete(
            connection: AsyncConnection, kept: sender_pb2.Sender
        ) -> sender_pb2.Sender:
            if kept.smtp.ca_certificates:
                sender_id = parse_id(kept.sender_id, "sender_id")
                found = await storage.read_sender(connection, sender_id, user_id)
                kept.smtp.ca_certificates = (found and found.smtp_ca) or ""
            return kept

        return await self._changes.make(
            request, user_id, sender_pb2.Sender, change, complete, validate_only=validate_only
        )

    async def _check_domain(
        self, connection: AsyncConnection, owner: str, values: Mapping[str, Any]
    ) -> None:
        """Check a new From address by OUTBOX_SENDER_POLICY.

        Raises:
            PermissionDenied: SENDER_DOMAIN_NOT_ALLOWED.
        """
        if self._settings.sender_policy == "domains" and "email" in values:
            domains = await read_domains(connection, owner)
            check_sender_domain(values["email"], domains, owner)

    def _answer(self, record: storage.SenderRecord) -> sender_pb2.Sender:
        return to_sender(record, self._settings.min_gap)


def _target(record: storage.SenderRecord) -> str:
    return f"senders/{record.sender_id}"


def _log_ended(sender_id: int, cooldown: CooldownRecord | None, *, by: str) -> None:
    """Log that a method ended a cooldown, as dispatchers log what begins and ends one."""
    if cooldown is not None:
        _log.warning(
            "cooldown_ended",
            sender=sender_id,
            by=by,
            since=cooldown.since.isoformat(timespec="seconds"),
            reply=cooldown.reply,
        )
