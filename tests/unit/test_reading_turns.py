"""Threads that read rows take turns."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from outbox_server.shared import reading_turns
from outbox_server.shared.fair_shares import Claimant
from outbox_server.shared.intake.rows import read_blocks
from outbox_server.shared.reading_turns import ReadingTurns, given_back, pass_on
from tests.eventually import PATIENCE, eventually

ANN, EVE = Claimant("ann"), Claimant("eve")


class Readers:
    """Threads that read for a user."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.turns = ReadingTurns()
        self._threads = threads
        # The users of the threads, in the order in which these got the turn.
        self.order: list[str] = []

    async def start(
        self, owner: Claimant, work: Callable[[], Any], *, others_call: bool = False
    ) -> asyncio.Future[None]:
        """Start a thread; return once it has the turn or waits for it."""

        def run() -> None:
            with self.turns.taken(owner, lambda: others_call):
                self.order.append(owner.name)
                work()

        before = len(self.order) + self.turns.waiting
        begun = asyncio.get_running_loop().run_in_executor(self._threads, run)
        await eventually(lambda: len(self.order) + self.turns.waiting > before)
        return begun


@pytest.fixture
def readers() -> Iterator[Readers]:
    with ThreadPoolExecutor(8) as threads:
        yield Readers(threads)


async def test_one_thread_reads_at_a_time_and_the_users_take_turns(readers: Readers) -> None:
    done = threading.Event()
    threads = [await readers.start(EVE, done.wait)]
    threads += [await readers.start(owner, lambda: None) for owner in (EVE, EVE, ANN)]
    assert (readers.order, readers.turns.waiting) == (["eve"], 3)
    done.set()
    await asyncio.gather(*threads)
    assert readers.order == ["eve", "eve", "ann", "eve"]
    assert readers.turns.waiting == 0


async def test_a_thread_passes_its_turn_on_while_it_reads(readers: Readers) -> None:
    begin = threading.Event()

    class Plan:
        def read(self, _: int, raw: Any) -> Any:
            return raw

    def rows() -> Iterator[tuple[int, Any]]:
        begin.wait(PATIENCE)
        for number in range(1, 1_001):
            read.append(number)
            yield number, ("a@b.org", "")

    read, seen = list[int](), list[int]()
    reading = await readers.start(EVE, lambda: list(read_blocks(rows(), Plan())))
    waiting = await readers.start(ANN, lambda: seen.append(len(read)))
    begin.set()
    await asyncio.gather(reading, waiting)
    assert (len(read), seen) == (1_000, [100])


@pytest.mark.parametrize("others_call", [False, True])
async def test_a_thread_rests_while_others_call_and_do_not_read(
    readers: Readers, monkeypatch: pytest.MonkeyPatch, *, others_call: bool
) -> None:
    rests: list[float] = []
    clock = itertools.count()

    class FakeTime:
        """Each part takes a millisecond."""

        monotonic = staticmethod(lambda: next(clock) / 1000)
        sleep = rests.append

    def run() -> None:
        with readers.turns.taken(EVE, lambda: others_call):
            pass_on()
            pass_on()

    monkeypatch.setattr(reading_turns, "time", FakeTime)
    await asyncio.to_thread(run)
    assert rests == pytest.approx([0.003, 0.003] if others_call else [])
    # Others read as well: they go first instead.
    done = threading.Event()

    def read() -> None:
        done.wait(PATIENCE)
        pass_on()

    rests.clear()
    reading = await readers.start(EVE, read, others_call=others_call)
    other = await readers.start(ANN, lambda: None)
    done.set()
    await asyncio.gather(reading, other)
    assert rests == []


async def test_a_thread_that_waits_gives_its_turn_back(readers: Readers) -> None:
    done = threading.Event()

    def wait() -> None:
        with given_back():
            done.wait(PATIENCE)
        # It has the turn again, so another thread cannot have it.
        assert readers.turns._taken

    waiting = await readers.start(EVE, wait)
    await (await readers.start(ANN, lambda: None))
    done.set()
    await waiting


async def test_a_turn_ends_with_an_error(readers: Readers) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await (await readers.start(EVE, fail))
    await (await readers.start(ANN, lambda: None))


def test_without_a_turn_nothing_is_passed_on() -> None:
    pass_on()
    with given_back():
        pass
