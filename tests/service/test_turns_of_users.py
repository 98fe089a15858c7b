"""While a call of Ann's runs, nothing begins of what Eve does again and again."""

from __future__ import annotations

import asyncio
import gc
import time
from asyncio import events
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from outbox.v1.batch_service_pb2 import ScheduleBatchRequest, UploadBatchRequest
from outbox.v1.email_job_service_pb2 import ExportEmailJobsRequest, ListEmailJobsRequest
from outbox.v1.sender_pb2 import Sender
from outbox.v1.sender_service_pb2 import GetSenderRequest

from outbox_server.shared import recent_callers, turns
from outbox_server.shared.turns import Turn
from tests.scheduler_stack import options_for
from tests.two_users import ROUNDS, Metadata, Rivals, give_up, rivals

Call = Callable[[], Awaitable[Any]]

LATER: Final = Timestamp(seconds=4_000_000_000)
ROWS: Final = 6_000
CSV: Final = b"email,name\n" + b"".join(b"u%d@b.org,%060d\n" % (n, n) for n in range(ROWS))
HERS: Final = 20
# What Eve begins in all before the share that begins within Ann's calls is computed.
ENOUGH: Final = 40
# The longest step of the event loop, in seconds of its processor time: most take less than 0.003,
# and without parts up to 0.03.
LONGEST_S: Final = 0.02


class Begun:
    """Counts what Eve begins, in all and while a call of Ann's runs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.in_all = self.within = 0
        self._hers: set[Turn] = set()
        take, leave, next_part = Turn.take, Turn.leave, Turn.next_part

        def note(turn: Turn) -> None:
            if turn.claimant.name == "ann":
                self._hers.add(turn)
            else:
                self.in_all += 1
                self.within += bool(self._hers)

        async def noted_take(turn: Turn) -> None:
            await take(turn)
            note(turn)

        def noted_leave(turn: Turn) -> None:
            self._hers.discard(turn)
            leave(turn)

        async def noted_part(turn: Turn) -> None:
            await next_part(turn)
            note(turn)

        patch.setattr(Turn, "take", noted_take)
        patch.setattr(Turn, "leave", noted_leave)
        patch.setattr(Turn, "next_part", noted_part)


class Floods:
    """What Eve calls again and again."""

    def __init__(self, both: Rivals, sender: Sender, batch_id: str) -> None:
        self._both = both
        self._sender = sender
        self._batch_id = batch_id
        self.kinds: dict[str, tuple[Call, int]] = {
            "get": (lambda: get(both, sender, both.eve), 20),
            "schedule": (lambda: schedule(both, sender, both.eve), 20),
            "csv": (lambda: schedule(both, sender, both.eve, CSV), 2),
            "upload": (self._upload, 2),
            "export": (self._export, 5),
            "list": (self._list, 5),
        }

    @asynccontextmanager
    async def running(self, kind: str) -> AsyncIterator[None]:
        call, at_once = self.kinds[kind]

        async def repeat() -> None:
            while True:
                with suppress(grpc.aio.AioRpcError):
                    await call()

        tasks = [asyncio.ensure_future(repeat()) for _ in range(at_once)]
        try:
            yield
        finally:
            await give_up(tasks)

    async def _upload(self) -> None:
        async def messages() -> AsyncIterator[UploadBatchRequest]:
            yield UploadBatchRequest(options=options_for(self._sender, schedule_time=LATER))
            yield UploadBatchRequest(chunk=CSV)

        await self._both.scheduler.batches.UploadBatch(messages(), metadata=self._both.eve)

    async def _export(self) -> None:
        request = ExportEmailJobsRequest(batch_id=self._batch_id)
        async for _ in self._both.scheduler.jobs.ExportEmailJobs(request, metadata=self._both.eve):
            pass

    async def _list(self) -> None:
        request = ListEmailJobsRequest(batch_id=self._batch_id, page_size=1_000)
        await self._both.scheduler.jobs.ListEmailJobs(request, metadata=self._both.eve)


async def get(both: Rivals, sender: Sender, key: Metadata) -> None:
    request = GetSenderRequest(sender_id=sender.sender_id)
    await both.scheduler.senders.GetSender(request, metadata=key)


async def schedule(
    both: Rivals, sender: Sender, key: Metadata, csv: bytes = b"email\na@b.org\n"
) -> str:
    request = ScheduleBatchRequest(options=options_for(sender, schedule_time=LATER), csv=csv)
    answer = await both.scheduler.batches.ScheduleBatch(request, metadata=key)
    return str(answer.batch.batch_id)


async def test_nothing_of_a_flood_begins_while_a_call_of_another_user_runs(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However busy the machine is, no call runs for longer than others give way.
    monkeypatch.setattr(recent_callers, "_PRESENT_S", 3600.0)
    for name in ("_COUNTS_S", "_GIVES_WAY_S"):
        monkeypatch.setattr(turns, name, 3600.0)
    async with rivals(database_url, redis_url) as both:
        hers, evil = await both.sender(both.ann), await both.sender(both.eve)
        floods = Floods(both, evil, await schedule(both, evil, both.eve, CSV))
        begun = Begun(monkeypatch)
        for kind in floods.kinds:
            async with floods.running(kind):
                await get(both, hers, both.ann)
                begun.in_all = begun.within = 0
                calls = 0
                while calls < HERS or begun.in_all < ENOUGH:
                    await get(both, hers, both.ann)
                    await schedule(both, hers, both.ann)
                    calls += 1
                # A call of Eve's may begin at the same moment as a turn of Ann's.
                assert begun.within * 5 <= begun.in_all, kind


async def test_no_step_of_long_work_takes_long(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[float] = []
    run = events.Handle._run

    def timed(handle: events.Handle) -> None:
        began = time.thread_time()
        run(handle)
        steps.append(time.thread_time() - began)

    async with rivals(database_url, redis_url) as both:
        evil = await both.sender(both.eve)
        floods = Floods(both, evil, await schedule(both, evil, both.eve, CSV))
        monkeypatch.setattr(events.Handle, "_run", timed)
        for kind, (call, _) in floods.kinds.items():
            # The first call prepares statements and fills caches.
            await call()
            longest: list[float] = []
            gc.disable()
            try:
                # A step without parts takes long each time. A busy machine slows some steps down.
                while len(longest) < ROUNDS and min(longest, default=LONGEST_S) >= LONGEST_S:
                    steps.clear()
                    await call()
                    longest.append(max(steps))
            finally:
                gc.enable()
            assert min(longest) < LONGEST_S, kind
