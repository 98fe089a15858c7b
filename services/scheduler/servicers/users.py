"""Implements UserService, for operators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Final

from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1 import user_pb2, user_service_pb2, user_service_pb2_grpc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox_server.services.scheduler.changes import Changes, Made, differences
from outbox_server.services.scheduler.servicers.calls import Context, check_mask, named_user
from outbox_server.services.scheduler.storage import users as storage
from outbox_server.shared import bounds
from outbox_server.shared.callers import current_caller, require_user
from outbox_server.shared.durations import format_duration
from outbox_server.shared.errors import InvalidInput, Violations
from outbox_server.shared.filters.resources import USER_FIELDS, USER_ORDERS, checked_list
from outbox_server.shared.heads.loader import HeadLoader, load_user_soon
from outbox_server.shared.queue.user_limits import UserSendLimits
from outbox_server.shared.quotas.storage import UserUsage, read_usage
from outbox_server.shared.rpc.paging import requested_page
from outbox_server.shared.rpc.proto_mapping import from_duration, to_duration, to_timestamp
from outbox_server.shared.sender_domains import normalise_domain
from outbox_server.shared.user_quotas import LEAST_QUOTAS, QUOTAS, UserQuotas

_DOMAINS: Final = "sender_domains"
_QUOTA_PATHS: Final = {f"quotas.{name}": name for name in QUOTAS}
# The column of each limit.
_LIMIT_PATHS: Final = {"limits.hourly_limit": "hourly_limit", "limits.min_gap": "min_gap_ms"}
_GROUPS: Final = {"quotas": tuple(_QUOTA_PATHS), "limits": tuple(_LIMIT_PATHS)}
_MILLISECOND: Final = timedelta(milliseconds=1)


class UserServicer(user_service_pb2_grpc.UserServiceServicer):
    """Shows and changes the quotas, the limits and the domains of users."""

    def __init__(
        self,
        engine: AsyncEngine,
        loader: HeadLoader,
        quotas: UserQuotas,
        limits: UserSendLimits,
        changes: Changes,
    ) -> None:
        """`quotas` and `limits` are the defaults, for users without overrides."""
        self._engine = engine
        self._loader = loader
        self._quotas = quotas
        self._limits = limits
        self._changes = changes

    async def GetUser(
        self,
        request: user_service_pb2.GetUserRequest,
        context: Context,
    ) -> user_pb2.User:
        """Return one user."""
        user_id = require_user(current_caller(), request.user_id)
        async with self._engine.connect() as connection:
            return await self._read(connection, user_id)

    async def ListUsers(
        self,
        request: user_service_pb2.ListUsersRequest,
        context: Context,
    ) -> user_service_pb2.ListUsersResponse:
        """Return one page of the users that Outbox knows."""
        wrong = Violations()
        tree, descending = checked_list(request, USER_FIELDS, USER_ORDERS, wrong)
        wrong.raise_any()
        page = requested_page(request, "users", start=("",))
        async with self._engine.connect() as connection:
            found, reached = await storage.list_users(
                connection, tree, *page.after, page.limit, descending=descending
            )
        shown, token = page.cut(
            found, lambda user: (user.user_id,), None if reached is None else (reached,)
        )
        return user_service_pb2.ListUsersResponse(
            users=[self._to_user(user) for user in shown], next_page_token=token
        )

    async def UpdateUser(
        self,
        request: user_service_pb2.UpdateUserRequest,
        context: Context,
    ) -> user_pb2.User:
        """Change some quotas, limits or the domains of a user."""
        user = request.user
        mask = request.update_mask if request.HasField("update_mask") else None
        values: dict[str, Any] = {}
        wrong = Violations()
        user_id = wrong.value(lambda: named_user(user.user_id, "user.user_id"), "")
        for path in wrong.value(lambda: _paths(user, mask), ()):
            with wrong:
                if path == _DOMAINS:
                    values[_DOMAINS] = _checked_domains(user.sender_domains)
                elif path in _LIMIT_PATHS:
                    values[_LIMIT_PATHS[path]] = _checked_limit(user.limits, path)
                else:
                    values[_QUOTA_PATHS[path]] = _checked_quota(user.quotas, _QUOTA_PATHS[path])
        wrong.raise_any()

        async def update(connection: AsyncConnection) -> Made[user_pb2.User]:
            before = await storage.read_user(connection, user_id)
            senders: Sequence[int] = ()
            if values:
                await storage.update_user(connection, user_id, values)
            if values.keys() & set(_LIMIT_PATHS.values()):
                senders = await storage.mark_senders_stale(connection, user_id)
            after = await storage.read_user(connection, user_id)

            async def afterwards() -> None:
                if senders:
                    await load_user_soon(self._loader, user_id, senders)

            was, became = differences(_audited(before), _audited(after))
            return Made(
                self._to_user(after, await read_usage(connection, user_id)),
                f"users/{user_id}",
                user_id,
                before=was,
                after=became,
                changed=bool(values),
                afterwards=afterwards,
            )

        return await self._changes.make(request, user_id, user_pb2.User, update)

    async def _read(self, connection: AsyncConnection, user_id: str) -> user_pb2.User:
        found = await storage.read_user(connection, user_id)
        return self._to_user(found, await read_usage(connection, user_id))

    def _to_user(self, record: storage.UserRecord, usage: UserUsage | None = None) -> user_pb2.User:
        effective = self._quotas.overridden(record.overrides)
        limits = self._limits.overridden(record.hourly_limit, record.min_gap_ms)
        return user_pb2.User(
            user_id=record.user_id,
            quotas=user_pb2.UserQuotas(**record.overrides),
            effective_quotas=user_pb2.UserQuotas(
                **{name: getattr(effective, name) for name in QUOTAS}
            ),
            limits=user_pb2.UserLimits(
                hourly_limit=record.hourly_limit,
                min_gap=None
                if record.min_gap_ms is None
                else to_duration(record.min_gap_ms * _MILLISECOND),
            ),
            effective_limits=user_pb2.UserLimits(
                hourly_limit=limits.hourly_limit, min_gap=to_duration(limits.gap)
            ),
            sender_domains=record.sender_domains,
            usage=None
            if usage is None
            else user_pb2.UserUsage(
                waiting_job_count=usage.waiting_jobs,
                sender_count=usage.senders,
                stored_rejection_count=usage.stored_rejections,
                stored_event_count=usage.stored_events,
                suppression_count=usage.suppressions,
                webhook_count=usage.webhooks,
            ),
            update_time=None if record.updated_at is None else to_timestamp(record.updated_at),
        )


def _audited(record: storage.UserRecord) -> dict[str, Any]:
    """Return the values of a user for the audit log; those with their default are left out."""
    values = {
        **record.overrides,
        "hourly_limit": record.hourly_limit,
        "min_gap_ms": record.min_gap_ms,
        "sender_domains": list(record.sender_domains) or None,
    }
    return {name: value for name, value in values.items() if value is not None}


_USABLE: Final = (
    f"use {_DOMAINS}, quotas, limits, one of these such as quotas.senders or limits.min_gap, or * "
    "for all of them"
)


def _paths(user: user_pb2.User, mask: FieldMask | None) -> Iterable[str]:
    """Return the fields to change: the fields of the mask or, without a mask, all that are set."""
    if mask is None or not mask.paths:
        given = [path for path, name in _QUOTA_PATHS.items() if _is_set(user.quotas, name)]
        given += [path for path in _LIMIT_PATHS if _is_set(user.limits, _field_of(path))]
        return [*given, _DOMAINS] if user.sender_domains else given
    known = ("*", _DOMAINS, *_GROUPS, *_QUOTA_PATHS, *_LIMIT_PATHS)
    check_mask(mask.paths, known, lambda _: _USABLE)
    paths: dict[str, None] = {}
    for path in mask.paths:
        for group, members in _GROUPS.items():
            if path in ("*", group):
                paths.update(dict.fromkeys(members))
        if path in ("*", _DOMAINS):
            paths[_DOMAINS] = None
        elif path not in _GROUPS:
            paths[path] = None
    return paths


def _is_set(message: user_pb2.UserQuotas | user_pb2.UserLimits, name: str) -> bool:
    return message.HasField(name)  # type: ignore[arg-type]  # name is a field


def _field_of(path: str) -> str:
    return path.partition(".")[2]


def _checked_limit(limits: user_pb2.UserLimits, path: str) -> int | None:
    """Return the value of a limit's column."""
    if not _is_set(limits, _field_of(path)):
        return None
    if path == "limits.hourly_limit":
        value: int = limits.hourly_limit
        if not 0 <= value <= bounds.MAX_HOURLY_LIMIT:
            raise InvalidInput.field(
                f"user.{path}",
                f"must be 0 to {bounds.MAX_HOURLY_LIMIT:,} (got {value:,}); 0 means no limit, "
                "unset means the default",
                reason="USER_LIMIT_INVALID",
            )
        return value
    gap = from_duration(limits.min_gap, f"user.{path}")
    if not timedelta(0) <= gap <= bounds.MAX_GAP:
        raise InvalidInput.field(
            f"user.{path}",
            f"must be 0 to {format_duration(bounds.MAX_GAP)} (got {gap.total_seconds():g} s); 0 "
            "means none; unset means the default",
            reason="USER_LIMIT_INVALID",
        )
    return gap // _MILLISECOND


def _checked_quota(quotas: user_pb2.UserQuotas, name: str) -> int | None:
    if not _is_set(quotas, name):
        return None
    value: int = getattr(quotas, name)
    least = LEAST_QUOTAS.get(name, 0)
    if not least <= value <= bounds.MAX_QUOTA:
        raise InvalidInput.field(
            f"user.quotas.{name}",
            f"must be {least} to {bounds.MAX_QUOTA:,} (got {value:,}); unset means the default",
            reason="QUOTA_INVALID",
        )
    return value


def _checked_domains(given: Iterable[str]) -> list[str]:
    domains: dict[str, None] = {}
    wrong = Violations()
    for number, text in enumerate(given):
        field = f"user.sender_domains[{number}]"
        with wrong:
            try:
                domains[normalise_domain(text)] = None
            except ValueError as error:
                reason = "SENDER_DOMAIN_INVALID"
                raise InvalidInput.field(field, str(error), reason=reason) from None
    wrong.raise_any()
    return list(domains)
