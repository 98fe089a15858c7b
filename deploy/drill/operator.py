"""The operator of a drill: changes the limits of users, and releases held mail."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1.hold_service_pb2 import ReleaseHeldJobsRequest, ReleaseHeldJobsResponse
from outbox.v1.hold_service_pb2_grpc import HoldServiceStub
from outbox.v1.user_pb2 import User, UserLimits
from outbox.v1.user_service_pb2 import UpdateUserRequest
from outbox.v1.user_service_pb2_grpc import UserServiceStub

from outbox_server.deploy.drill.caller import TRY_LIMIT_S, Answered, DrillCaller
from outbox_server.shared.queue.user_limits import UserSendLimits

# The name of its key.
OPERATOR: Final = "operator"

T = TypeVar("T")


class DrillOperator:
    """Calls the schedulers with the key of an operator, and repeats each call until an answer."""

    def __init__(
        self, addresses: Sequence[str], credentials: grpc.ChannelCredentials | None
    ) -> None:
        """Without `credentials` there is neither TLS nor a key."""
        self._addresses = addresses
        self._credentials = credentials
        self.answered = Answered()

    async def set_limits(self, user_id: str, limits: UserSendLimits) -> None:
        """Set the limits of a user for all its senders together."""
        wanted = UserLimits(hourly_limit=limits.hourly_limit)
        wanted.min_gap.FromTimedelta(limits.gap)
        request = UpdateUserRequest(
            user=User(user_id=user_id, limits=wanted), update_mask=FieldMask(paths=["limits"])
        )

        async def update(channel: grpc.aio.Channel) -> User:
            return await UserServiceStub(channel).UpdateUser(request, timeout=TRY_LIMIT_S)

        await self._call(update)

    async def release_all(self) -> None:
        """Release everything that is held, as `outbox held release --all` does."""
        request = ReleaseHeldJobsRequest(all=True)

        async def release(channel: grpc.aio.Channel) -> ReleaseHeldJobsResponse:
            try:
                return await HoldServiceStub(channel).ReleaseHeldJobs(request, timeout=TRY_LIMIT_S)
            except grpc.aio.AioRpcError as error:
                # An earlier try has released all, but its answer was lost.
                if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                    raise
                return ReleaseHeldJobsResponse()

        await self._call(release)

    async def _call(self, call: Callable[[grpc.aio.Channel], Awaitable[T]]) -> T | None:
        chance = random.Random()
        async with DrillCaller(self.answered, self._addresses, self._credentials, chance) as caller:
            return await caller.until_answered(call)
