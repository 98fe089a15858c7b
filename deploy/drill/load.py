"""The load of a drill: uploads batches of many senders, and repeats each until it is answered."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from typing import Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1.batch_pb2 import BatchOptions
from outbox.v1.batch_service_pb2 import (
    CancelBatchRequest,
    ScheduleBatchResponse,
    UploadBatchRequest,
)
from outbox.v1.batch_service_pb2_grpc import BatchServiceStub
from outbox.v1.sender_pb2 import Sender, SmtpEndpoint
from outbox.v1.sender_service_pb2 import CreateSenderRequest
from outbox.v1.sender_service_pb2_grpc import SenderServiceStub

from outbox_server.deploy.drill.caller import TRY_LIMIT_S, Answered, DrillCaller
from outbox_server.deploy.drill.user_limits import GAP_USER, WINDOW_USER
from outbox_server.deploy.record import ReceivedMail

USER: Final = "drill"
WINDOW: Final = timedelta(seconds=5)
_SENDERS: Final = 24
# One of four senders has no gap and several mails in flight; the others have a gap.
_FAST_EVERY: Final = 4
# One of three senders has its own relay.
_OWN_EVERY: Final = 3
# Which senders, of eight, belong to a user with limits: one that is fast, and one with a gap.
_USERS: Final = {4: WINDOW_USER, 7: GAP_USER}
USERS: Final = (USER, *_USERS.values())
# How much longer a job of theirs takes, so that a drill does not wait for them at its end.
_SLOWER: Final = 3
_PAUSE_S: Final = (0.05, 0.3)
_ROWS: Final = (2, 12)
# Jobs that may wait at once: as many as are sent within about five seconds.
_MOST_WAITING: Final = 200
_CANCELLED_SHARE: Final = 0.06


class Load:
    """Uploads until it is stopped, but never more than can be sent within some seconds."""

    def __init__(
        self,
        seed: int,
        addresses: Sequence[str],
        *,
        arrived: Sequence[ReceivedMail],
        refused: Sequence[str],
        endpoint: SmtpEndpoint,
        credentials: Mapping[str, grpc.ChannelCredentials] | None = None,
    ) -> None:
        """Take the schedulers' addresses, two lists that grow, a relay, and TLS with an API key.

        `arrived` has the mails that have arrived, `refused` the sender address of each mail that
        was permanently refused. Every third sender has `endpoint` as its own relay; the others use
        the operator's relay. Without the `credentials` of each user there is neither TLS nor a key.
        """
        self._chance = random.Random(seed)
        self.answered = Answered()
        self._callers = {
            user: DrillCaller(self.answered, addresses, known, self._chance)
            for user in USERS
            for known in [None if credentials is None else credentials[user]]
        }
        self._arrived = arrived
        self._refused = refused
        self._endpoint = endpoint
        self._looked_at = (0, 0)
        # Number of waiting jobs per sender, as far as this side knows.
        self._waiting: Counter[str] = Counter()
        # Ids by From address.
        self._senders: dict[str, str] = {}
        # Users by From address.
        self.user_of: dict[str, str] = {}
        self._number = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Upload until `stop`, then wait until all uploads in progress are answered."""
        async with AsyncExitStack() as stack:
            for caller in self._callers.values():
                await stack.enter_async_context(caller)
            for number in range(_SENDERS):
                made = await self._create(number)
                self._senders[made.email] = made.sender_id
            async with asyncio.TaskGroup() as group:
                while not stop.is_set():
                    self._count_ended()
                    # Use the less busy one of two senders, so that no work piles up at a slow one.
                    sender = min(
                        self._chance.sample(sorted(self._senders), 2),
                        key=self._seconds_of_work,
                    )
                    if self._waiting.total() < _MOST_WAITING:
                        group.create_task(self._upload(sender))
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._chance.uniform(*_PAUSE_S)):
                            await stop.wait()

    def _seconds_of_work(self, sender: str) -> int:
        """Return about how long the waiting jobs of a sender take, in any unit."""
        slower = 1 if self.user_of[sender] == USER else _SLOWER
        return self._waiting[sender] * slower

    def _count_ended(self) -> None:
        arrived, refused = self._looked_at
        self._looked_at = (len(self._arrived), len(self._refused))
        self._waiting.subtract(mail.mail_from for mail in self._arrived[arrived:])
        self._waiting.subtract(self._refused[refused:])

    async def _create(self, number: int) -> Sender:
        fast = number % _FAST_EVERY == 0
        user = _USERS.get(number % 8, USER)
        sender = Sender(
            email=f"s{number}@drill.example",
            hourly_limit=8 + 2 * (number % 12),
            min_gap=None if fast else Duration(nanos=(1 + number % 4) * 100_000_000),
            max_in_flight=4 if fast else None,
            smtp=self._endpoint if number % _OWN_EVERY == 1 else None,
        )
        self.user_of[sender.email] = user
        request = CreateSenderRequest(user_id=user, sender=sender)
        channel = self._callers[user].first
        return await SenderServiceStub(channel).CreateSender(request, timeout=30)

    async def _upload(self, sender: str) -> None:
        chance, number = self._chance, self._number
        self._number += 1
        user = self.user_of[sender]
        caller = self._callers[user]
        rows = chance.randint(*_ROWS)
        start = Timestamp()
        start.GetCurrentTime()
        start.seconds += chance.choice((0, 0, 0, 1, 3))
        options = BatchOptions(
            request_id=f"drill-{number}",
            user_id=user,
            sender_id=self._senders[sender],
            subject="Drill {{ n }}",
            body="Mail {{ n }} of a drill.",
            schedule_time=start,
        )
        lines = (f"b{number}-{row}@rcpt.example,{number}-{row}" for row in range(rows))
        csv = "\n".join(("email,n", *lines)).encode()
        cancel = chance.random() < _CANCELLED_SHARE
        self._waiting[sender] += rows

        async def upload(channel: grpc.aio.Channel) -> ScheduleBatchResponse:
            call = BatchServiceStub(channel).UploadBatch(
                _messages(options, csv), timeout=TRY_LIMIT_S
            )
            return await call

        answer = await caller.until_answered(upload)
        if answer is None:
            return
        batch = answer.batch
        if batch.accepted_count != rows:
            self.answered.wrong.append(f"a batch of {rows} rows has {batch.accepted_count}")
        self.answered.batches[batch.batch_id] = batch.accepted_count
        if cancel:
            self._waiting[sender] -= await self._cancel(batch.batch_id, user)

    async def _cancel(self, batch_id: str, user: str) -> int:
        request = CancelBatchRequest(batch_id=batch_id, user_id=user)
        answer = await self._callers[user].until_answered(
            lambda channel: BatchServiceStub(channel).CancelBatch(request, timeout=TRY_LIMIT_S)
        )
        if answer is None:
            return 0
        # A repeated call finds fewer jobs, so take the batch's count of all cancelled jobs.
        cancelled = answer.batch.counts.cancelled_count
        self.answered.cancelled += cancelled
        return cancelled


async def _messages(options: BatchOptions, csv: bytes) -> AsyncIterator[UploadBatchRequest]:
    yield UploadBatchRequest(options=options)
    yield UploadBatchRequest(chunk=csv)
