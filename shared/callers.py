"""Who calls, and for which user: the caller of the call under way.

`current_caller()` holds inside a servicer's method and in every task that it starts.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from outbox_server.shared.bounds import USER_ID
from outbox_server.shared.errors import InvalidInput, PermissionDenied, Unauthenticated

Metadata = Iterable[tuple[str, str | bytes]]


class CallerKind(StrEnum):
    """What a caller may act for."""

    # OUTBOX_AUTH=off: whoever reaches the loopback listener. May act for any user.
    LOCAL = "local"
    # A key of one user. May act for that user alone.
    USER = "user"
    # A key of another backend. May act for any user.
    SERVICE = "service"
    # A key of an operator. May act for any user, and call the operator's own services.
    OPERATOR = "operator"


# Services that tell of, and change, the whole system.
_OPERATOR_SERVICES: Final = frozenset({"outbox.v1.DispatcherService"})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who made a call. `user_id` is set for kind USER, and for no other."""

    user_id: str | None
    kind: CallerKind


class Authenticator(Protocol):
    """Finds out who calls."""

    async def authenticate(self, metadata: Metadata) -> Caller:
        """Return the caller that the call's metadata prove.

        Raises:
            Unauthenticated: they prove none.
        """

    async def close(self) -> None:
        """Finish what goes on beside the calls; none follows."""


class LocalAuthenticator:
    """OUTBOX_AUTH=off: everybody is the LOCAL caller."""

    _caller = Caller(user_id=None, kind=CallerKind.LOCAL)

    async def authenticate(self, metadata: Metadata) -> Caller:  # noqa: ARG002 - nothing is asked
        """Return the LOCAL caller."""
        return self._caller

    async def close(self) -> None:
        """Do nothing."""


def is_loopback(listen: str) -> bool:
    """Say whether only this machine reaches `listen` (`host:port`, or `unix:path`)."""
    if listen.startswith("unix:"):
        return True
    return is_loopback_host(listen.rpartition(":")[0].strip("[]"))


def is_loopback_host(host: str) -> bool:
    """Say whether `host`, a name or an address, is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may mean any address tomorrow


class Call:
    """A call under way: who makes it, and whether its statements are bound to a user yet."""

    __slots__ = ("bounded", "caller")

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        # Set by `shared.database.ownership` alone.
        self.bounded = False


_current: ContextVar[Call | None] = ContextVar("outbox_call", default=None)


def set_current_caller(caller: Caller) -> None:
    """Make `caller` the one of the call under way; the server does this for every call."""
    _current.set(Call(caller))


def current_caller() -> Caller:
    """Return the caller of the call under way.

    Raises:
        Unauthenticated: there is none, outside of a call.
    """
    call = _current.get()
    if call is None:
        raise Unauthenticated("there is no caller outside of a call")
    return call.caller


def call_under_way() -> Call | None:
    """Return the call under way; None outside of one."""
    return _current.get()


def check_may_call(caller: Caller, method: str) -> None:
    """Check that `caller` may call `method` (`/outbox.v1.StatsService/GetUserStats`) at all.

    Raises:
        PermissionDenied: it is the operator's, and the caller is none (OPERATOR_REQUIRED).
    """
    service = method.removeprefix("/").partition("/")[0]
    if service in _OPERATOR_SERVICES and caller.kind not in (
        CallerKind.LOCAL,
        CallerKind.OPERATOR,
    ):
        raise PermissionDenied(
            f"only an operator's API key may call {service}",
            reason="OPERATOR_REQUIRED",
            metadata={"service": service},
        )


def effective_user(caller: Caller, requested_user_id: str, field: str = "user_id") -> str | None:
    """Return the user to act for: the one asked for, or the caller's own where none is ("").

    None: the caller may act for any user and named none.

    Raises:
        PermissionDenied: the caller is a user and asked for another (USER_MISMATCH).
        InvalidInput: what is asked for can be no user's id (USER_ID_INVALID, of `field`).
    """
    if requested_user_id:
        USER_ID.check(field, requested_user_id)
    if caller.kind is not CallerKind.USER:
        return requested_user_id or None
    if requested_user_id and requested_user_id != caller.user_id:
        raise PermissionDenied(
            "the API key belongs to another user than user_id",
            reason="USER_MISMATCH",
            metadata={"user_id": requested_user_id},
        )
    return caller.user_id


def require_user(caller: Caller, requested_user_id: str) -> str:
    """Return the user to act for, where a call makes no sense without one.

    Raises:
        PermissionDenied: the caller is a user and asked for another (USER_MISMATCH).
        InvalidInput: the caller may act for any user and named none (USER_ID_REQUIRED), or what
            it named can be no user's id (USER_ID_INVALID).
    """
    user_id = effective_user(caller, requested_user_id)
    if user_id is None:
        raise InvalidInput.field(
            "user_id",
            "say for which user; only a user's own API key can leave it out",
            reason="USER_ID_REQUIRED",
        )
    return user_id
