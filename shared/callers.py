"""The caller of the current call, and the user that it acts for.

`current_caller()` works in a servicer's method and in every task that the method starts.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol, TypeVar

from outbox_server.shared.bounds import USER_ID
from outbox_server.shared.errors import InvalidInput, PermissionDenied, Unauthenticated
from outbox_server.shared.fair_shares import NOBODY, Claimant, HeldPlace
from outbox_server.shared.turns import Turn
from outbox_server.shared.user_quotas import UserQuotas

Metadata = Iterable[tuple[str, str | bytes]]
S = TypeVar("S")
T = TypeVar("T")


class CallerKind(StrEnum):
    """The kinds of callers, which differ in the users that they may act for."""

    # OUTBOX_AUTH=off: any process that reaches the loopback listener. May act for any user.
    LOCAL = "local"
    # A key of one user. May act for that user only.
    USER = "user"
    # A key of another backend. May act for any user.
    SERVICE = "service"
    # A key of an operator. May act for any user, and call the operator's own services.
    OPERATOR = "operator"


# How many items of a list are converted before others run. Most take 0.02 ms.
ITEMS_AT_ONCE: Final = 100
# Services that show and change the whole system, not one user's resources.
_OPERATOR_SERVICES: Final = frozenset(
    {
        "outbox.v1.ApiKeyService",
        "outbox.v1.AuditService",
        "outbox.v1.DispatcherService",
        "outbox.v1.HoldService",
        "outbox.v1.UserService",
    }
)


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a call. `user_id` is set for kind USER only."""

    user_id: str | None
    kind: CallerKind
    # The public id of the API key. None means that no key was needed.
    key_id: str | None = field(default=None, compare=False)
    # Set for kind USER only: the other kinds act for many users.
    quotas: UserQuotas | None = field(default=None, compare=False)
    # Whether it may call only methods that change nothing (`shared.rpc.reads`).
    read_only: bool = False

    @property
    def claimant(self) -> Claimant:
        """The claimant whose share the caller's work uses (see `shared.fair_shares`).

        All keys of a user have one share together. Each key of a service has a share of its own.
        """
        match self.kind:
            case CallerKind.USER:
                return Claimant(self.user_id or "")
            case CallerKind.SERVICE:
                return Claimant(self.key_id or "", "service key")
            case CallerKind.OPERATOR:
                return Claimant(self.key_id or "", "operator key", privileged=True)
            case CallerKind.LOCAL:
                return Claimant("", "local caller", privileged=True)


class Authenticator(Protocol):
    """Authenticates calls."""

    async def authenticate(self, metadata: Metadata) -> Caller:
        """Return the caller that the call's metadata prove.

        Raises:
            Unauthenticated: the metadata have no valid credentials.
        """

    async def close(self) -> None:
        """Finish background work, after the last call."""


class LocalAuthenticator:
    """The authenticator of OUTBOX_AUTH=off: every caller is LOCAL."""

    _caller = Caller(user_id=None, kind=CallerKind.LOCAL)

    async def authenticate(self, metadata: Metadata) -> Caller:
        """Return the LOCAL caller."""
        del metadata
        return self._caller

    async def close(self) -> None:
        """Do nothing."""


def is_loopback(listen: str) -> bool:
    """Return whether only this machine can reach `listen` (`host:port` or `unix:path`)."""
    if listen.startswith("unix:"):
        return True
    return is_loopback_host(listen.rpartition(":")[0].strip("[]"))


def is_loopback_host(host: str) -> bool:
    """Return whether `host`, a name or an address, is a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may resolve to any address later


class Call:
    """A call in progress: its caller, and whether its SQL is restricted to one user yet."""

    __slots__ = ("bounded", "caller", "place", "turn", "user_id")

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        # The user that the call acts for, if it is known. The log shows it.
        self.user_id = caller.user_id
        # Only `shared.database.ownership` sets it.
        self.bounded = False
        # The call's place among the calls at once, while it has one.
        self.place: HeldPlace | None = None
        # Its turn among the running calls of its user, once it runs.
        self.turn: Turn | None = None


_current: ContextVar[Call | None] = ContextVar("outbox_call", default=None)


def set_current_caller(caller: Caller) -> None:
    """Set the caller of the current call. The server does this for every call."""
    _current.set(Call(caller))


def current_caller() -> Caller:
    """Return the caller of the current call.

    Raises:
        Unauthenticated: the code does not run in a call.
    """
    call = _current.get()
    if call is None:
        raise Unauthenticated("there is no caller outside of a call")
    return call.caller


def call_under_way() -> Call | None:
    """Return the current call; None outside of a call."""
    return _current.get()


def current_claimant() -> Claimant:
    """Return the claimant whose share the current call uses; NOBODY outside of a call."""
    call = _current.get()
    return NOBODY if call is None else call.caller.claimant


def keep_place(place: HeldPlace, turn: Turn) -> None:
    """Note the place and the turn of the current call. The server does this."""
    call = _current.get()
    if call is not None:
        call.place, call.turn = place, turn


def leave_place() -> None:
    """Let another call have the place of the current one, which only waits until `take_turn`."""
    pause_turn()
    call = _current.get()
    if call is not None and call.place is not None:
        call.place.leave()


def leave_turn() -> None:
    """Let another call of the same user run: the current one only waits from now on."""
    call = _current.get()
    if call is not None and call.turn is not None:
        call.turn.leave()


def pause_turn() -> None:
    """Let another call of the same user run: the current one only waits until `take_turn`."""
    call = _current.get()
    if call is not None and call.turn is not None:
        call.turn.pause()


def others_call() -> Callable[[], bool]:
    """Return the function that says whether others call as well; it may be called in any thread.

    It is False for callers that hold nobody up.
    """
    call = _current.get()
    if call is None or call.turn is None or not call.turn.is_limited:
        return lambda: False
    return call.turn.others_call


async def take_turn() -> None:
    """Wait until the current call may run again."""
    call = _current.get()
    if call is not None and call.turn is not None:
        await call.turn.take()


async def next_part() -> None:
    """Let others run before the next part of long work in the event loop, such as 1 ms of it."""
    call = _current.get()
    if call is None or call.turn is None:
        await asyncio.sleep(0)
    else:
        await call.turn.next_part()


async def in_parts(
    items: Sequence[S], make: Callable[[S], T], at_once: int = ITEMS_AT_ONCE
) -> list[T]:
    """Return what `make` returns for each item. If there are many, others run in between.

    `at_once` items must not take longer than 2 ms.
    """
    if len(items) <= at_once:
        return [make(each) for each in items]
    made: list[T] = []
    for first in range(0, len(items), at_once):
        await next_part()
        made += [make(each) for each in items[first : first + at_once]]
    return made


def check_may_call(caller: Caller, method: str) -> None:
    """Check that `caller` may call `method` (`/outbox.v1.StatsService/GetUserStats`) at all.

    Raises:
        PermissionDenied: the method is for operators, and the caller is not one
            (OPERATOR_REQUIRED).
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
    """Return the user to act for: the requested one or, if that is "", the caller's own user.

    None means any user: the caller may act for all users and named none.

    Raises:
        PermissionDenied: the caller is a user and requested another one (USER_MISMATCH).
        InvalidInput: the requested id is not valid (USER_ID_INVALID, with `field`).
    """
    if requested_user_id:
        USER_ID.check(field, requested_user_id)
    if caller.kind is not CallerKind.USER:
        call = _current.get()
        if call is not None and requested_user_id:
            call.user_id = requested_user_id
        return requested_user_id or None
    if requested_user_id and requested_user_id != caller.user_id:
        raise PermissionDenied(
            f"the API key does not belong to user_id {requested_user_id!r}",
            reason="USER_MISMATCH",
            metadata={"user_id": requested_user_id},
        )
    return caller.user_id


def require_user(caller: Caller, requested_user_id: str, field: str = "user_id") -> str:
    """Return the user to act for, in a call that needs one.

    Raises:
        PermissionDenied: the caller is a user and requested another one (USER_MISMATCH).
        InvalidInput: the caller may act for all users and named none (USER_ID_REQUIRED), or the
            requested id is not valid (USER_ID_INVALID), with `field`.
    """
    user_id = effective_user(caller, requested_user_id, field)
    if user_id is None:
        raise InvalidInput.field(
            field,
            "is required unless you use a user's own API key",
            reason="USER_ID_REQUIRED",
        )
    return user_id
