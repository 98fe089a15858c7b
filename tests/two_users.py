"""A scheduler with API keys: Ann does nothing unusual, and Eve does whatever may harm her."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from outbox.v1 import sender_pb2, sender_service_pb2, user_service_pb2_grpc
from outbox.v1.user_pb2 import User
from outbox.v1.user_service_pb2 import UpdateUserRequest

from outbox_server.shared.auth.keys import ApiKeyKind, make_key
from outbox_server.shared.auth.store import insert_key
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.settings import load_settings
from tests.scheduler_stack import Scheduler, running_scheduler

Metadata = tuple[tuple[str, str], ...]
# Below this, a difference of latencies is noise of a busy machine, in seconds.
NOISE: Final = 0.5
ROUNDS: Final = 4
_KINDS: Final = {
    "ann": ApiKeyKind.USER,
    "eve": ApiKeyKind.USER,
    "service": ApiKeyKind.SERVICE,
    "operator": ApiKeyKind.OPERATOR,
}


@dataclass(frozen=True)
class Rivals:
    """The scheduler, and the metadata with each caller's key."""

    scheduler: Scheduler
    users: Any
    ann: Metadata
    eve: Metadata
    service: Metadata
    operator: Metadata

    async def sender(self, key: Metadata, **fields: Any) -> sender_pb2.Sender:
        """Create a sender."""
        fields = {"email": "news@example.com", **fields}
        request = sender_service_pb2.CreateSenderRequest(sender=sender_pb2.Sender(**fields))
        return await self.scheduler.senders.CreateSender(request, metadata=key)

    async def set_quotas(self, user_id: str, **quotas: int) -> User:
        """Change quotas of a user, as an operator."""
        changed = User(user_id=user_id)
        for name, value in quotas.items():
            setattr(changed.quotas, name, value)
        request = UpdateUserRequest(user=changed)
        answer: User = await self.users.UpdateUser(request, metadata=self.operator)
        return answer


async def make_keys(database_url: str) -> dict[str, Metadata]:
    """Store a key for each caller, and return their metadata."""
    made: dict[str, Metadata] = {}
    engine = create_engine(load_settings(database_url=database_url))
    async with engine.begin() as connection:
        for name, kind in _KINDS.items():
            key = make_key()
            user_id = name if kind is ApiKeyKind.USER else None
            await insert_key(connection, key, kind, user_id, "")
            made[name] = (("authorization", f"Bearer {key.text}"),)
    await engine.dispose()
    return made


@asynccontextmanager
async def rivals(database_url: str, redis_url: str, **settings: Any) -> AsyncIterator[Rivals]:
    """Run a scheduler with API keys; `settings` are added to the usual ones."""
    async with AsyncExitStack() as stack:
        keys = await make_keys(database_url)
        scheduler = await stack.enter_async_context(
            running_scheduler(database_url, redis_url, auth="keys", smtp_ports="any", **settings)
        )
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(scheduler.address))
        yield Rivals(scheduler, user_service_pb2_grpc.UserServiceStub(channel), **keys)


def refusals(calls: Iterable[asyncio.Future[Any]]) -> Counter[tuple[str, str]]:
    """Count the refused calls among those that have ended: by reason, and whose limit it was."""
    found: Counter[tuple[str, str]] = Counter()
    for call in calls:
        if call.done() and not call.cancelled():
            error = call.exception()
            if isinstance(error, grpc.aio.AioRpcError):
                found[whose_limit(error)] += 1
    return found


def whose_limit(error: grpc.RpcError) -> tuple[str, str]:
    """Return the reason of a refusal, and the metadata that says whose limit was reached."""
    status = rpc_status.from_call(error)
    assert status is not None, f"no details: {error}"
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason, info.metadata["limit_of"] or info.metadata["user"]


async def give_up(calls: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel calls, and wait for their end."""
    calls = list(calls)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def p99(call: Callable[[], Awaitable[Any]], count: int = 50) -> float:
    """Return the 99th percentile of the latency of calls, made one after the other, in seconds."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[int(count * 0.99) - 1]


async def check_as_fast(call: Callable[[], Awaitable[Any]], quiet: float, count: int = 50) -> None:
    """Check that the 99th percentile is within twice its quiet value of the same run.

    A busy machine slows some rounds down; what another user holds slows down all of them.
    """
    found = []
    for _ in range(ROUNDS):
        found.append(await p99(call, count))
        if found[-1] < max(2 * quiet, NOISE):
            return
    raise AssertionError(f"quiet {quiet:.3f} s, beside another user {found}")
