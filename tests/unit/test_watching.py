from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from datetime import timedelta

from outbox_server.shared.callers import Caller, CallerKind, set_current_caller
from outbox_server.shared.rpc.watching import USER_READ, Watch
from tests.eventually import PATIENCE

HERS = 10_000


async def test_many_watches_of_one_user_are_read_in_turns_and_those_of_others_each_time() -> None:
    reads: list[set[int]] = []

    async def read(keys: Collection[int]) -> Mapping[int, int]:
        reads.append(set(keys))
        return dict.fromkeys(keys, len(reads))

    watch = Watch(read, timedelta(milliseconds=1))
    stop = asyncio.Event()

    async def follow(user_id: str, key: int, changes: int) -> None:
        set_current_caller(Caller(user_id, CallerKind.USER))
        seen = watch.follow(key)
        for _ in range(changes):
            await anext(seen)
        await seen.aclose()

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        running = group.create_task(watch.run(stop))
        others = [group.create_task(follow("eve", key, 2)) for key in range(3 * USER_READ)]
        await follow("ann", HERS, 7)
        await asyncio.wait(others)
        stop.set()
        await running
    with_hers = [keys for keys in reads if HERS in keys]
    assert len(with_hers) >= 7
    # Counted from the first read in which all watches are open.
    crowded = [keys for keys in with_hers if len(keys) > USER_READ]
    assert crowded
    assert all(len(keys) == USER_READ + 1 for keys in crowded)
