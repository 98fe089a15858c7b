"""A hostile user in a drill: it uses up all its shares, with mail that can never be sent."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Final

import grpc
from outbox.v1.batch_pb2 import BatchOptions
from outbox.v1.batch_service_pb2 import (
    CancelBatchRequest,
    CancelBatchResponse,
    ScheduleBatchRequest,
    ScheduleBatchResponse,
)
from outbox.v1.batch_service_pb2_grpc import BatchServiceStub
from outbox.v1.sender_pb2 import SMTP_SECURITY_NONE, Sender, SmtpEndpoint
from outbox.v1.sender_service_pb2 import CreateSenderRequest
from outbox.v1.sender_service_pb2_grpc import SenderServiceStub

from outbox_server.deploy.drill.caller import TRY_LIMIT_S, Answered, DrillCaller
from outbox_server.deploy.ports import LOOPBACK

HOSTILE_USER: Final = "hostile"
# More than the slots of the dispatchers of a drill.
SENDERS: Final = 12
_ROWS: Final = 3
# The end of its mail may have to wait for the end of other faults.
_CANCEL_LIMIT_S: Final = 120.0
_CANCEL_PAUSE_S: Final = 0.2


class HostileUser:
    """Schedules mail to servers that never reply, and cancels it at the end."""

    def __init__(
        self,
        addresses: Sequence[str],
        credentials: grpc.ChannelCredentials | None,
        endpoint_port: int,
    ) -> None:
        """`endpoint_port` is the port of a server which other users use. It expects TLS."""
        self._addresses = addresses
        self._credentials = credentials
        self._endpoint_port = endpoint_port
        self._attacks = 0
        self.answered = Answered()

    async def attack(self, variant: str, lasts: float) -> None:
        """Schedule mail for `lasts` seconds. Return when none of it is open any more.

        With the variant `silent`, each sender has a server of its own that accepts connections and
        sends no byte. With `same_server`, all name the server of other users, without TLS.
        """
        self._attacks += 1
        attack = self._attacks
        chance = random.Random(attack)
        async with AsyncExitStack() as stack:
            caller = DrillCaller(self.answered, self._addresses, self._credentials, chance)
            await stack.enter_async_context(caller)
            ports = [self._endpoint_port] * SENDERS
            if variant == "silent":
                ports = [await stack.enter_async_context(_silent_server()) for _ in range(SENDERS)]
            batches: list[str] = []
            try:
                for number, port in enumerate(ports):
                    batches += await self._schedule(caller, f"{attack}-{number}", port)
                await asyncio.sleep(lasts)
            finally:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_CANCEL_LIMIT_S):
                        # At once, as each waits for the end of a send.
                        await asyncio.gather(*(self._cancel(caller, one) for one in batches))

    async def _schedule(self, caller: DrillCaller, name: str, port: int) -> list[str]:
        sender = Sender(
            email=f"{name}@hostile.example",
            smtp=SmtpEndpoint(host=LOOPBACK, port=port, security=SMTP_SECURITY_NONE),
        )
        made = await caller.until_answered(
            lambda channel: SenderServiceStub(channel).CreateSender(
                CreateSenderRequest(user_id=HOSTILE_USER, sender=sender), timeout=TRY_LIMIT_S
            )
        )
        if made is None:
            return []
        request = ScheduleBatchRequest(
            options=BatchOptions(
                request_id=f"hostile-{name}",
                user_id=HOSTILE_USER,
                sender_id=made.sender_id,
                subject="Hostile",
                body="Nobody gets this.",
            ),
            csv="\n".join(("email", *(f"h{name}-{n}@rcpt.example" for n in range(_ROWS)))).encode(),
        )

        async def schedule(channel: grpc.aio.Channel) -> ScheduleBatchResponse:
            return await BatchServiceStub(channel).ScheduleBatch(request, timeout=TRY_LIMIT_S)

        answer = await caller.until_answered(schedule)
        if answer is None:
            return []
        self.answered.batches[answer.batch.batch_id] = answer.batch.accepted_count
        return [answer.batch.batch_id]

    async def _cancel(self, caller: DrillCaller, batch_id: str) -> None:
        """Cancel the waiting mail, until nothing is being sent either."""
        request = CancelBatchRequest(batch_id=batch_id, user_id=HOSTILE_USER)

        async def cancel(channel: grpc.aio.Channel) -> CancelBatchResponse:
            return await BatchServiceStub(channel).CancelBatch(request, timeout=TRY_LIMIT_S)

        while (answer := await caller.until_answered(cancel)) is not None:
            counts = answer.batch.counts
            if not counts.scheduled_count + counts.sending_count:
                self.answered.cancelled += counts.cancelled_count
                return
            await asyncio.sleep(_CANCEL_PAUSE_S)


@asynccontextmanager
async def _silent_server() -> AsyncIterator[int]:
    """Accept connections and send no byte. At the end, cut them all. Yields the port."""
    held: set[asyncio.StreamWriter] = set()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.add(writer)
        try:
            while await reader.read(1024):
                pass
        except OSError:
            pass  # the dispatcher was killed
        finally:
            held.discard(writer)
            writer.close()

    server = await asyncio.start_server(hold, LOOPBACK, 0)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for writer in held:
            writer.transport.abort()
        await server.wait_closed()
