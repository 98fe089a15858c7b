"""Templates are parsed and rendered in processes with limits, which users share fairly."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.settings import load_settings
from outbox_server.shared.templates.remote import TemplateParser
from outbox_server.shared.templates.source import RenderError
from outbox_server.shared.templates.workers import TooCostlyError, WorkerPool
from tests.eventually import eventually
from tests.worker_processes import WORKER, workers_here, workers_of

CONDITION = "{% if a %}x{% endif %}"
SORTING = (
    '{% assign l = a | split: "," %}{% for i in (1..1000) %}'
    "{% assign m = l | sort | reverse | uniq %}{% endfor %}x"
)
CELL = ",".join(f"item{n}" for n in range(900))
DATES = "{% for i in (1..1000) %}" + "{{ a | date: '%s' }}" * 100 + "{% endfor %}"


@asynccontextmanager
async def pool(**settings: Any) -> AsyncIterator[WorkerPool]:
    opened = WorkerPool(WORKER, load_settings(**settings))
    try:
        yield opened
    finally:
        await opened.close()
    assert workers_here() == []


@asynccontextmanager
async def parser(**settings: Any) -> AsyncIterator[TemplateParser]:
    parsing = TemplateParser(load_settings(**settings))
    try:
        yield parsing
    finally:
        await parsing.close()


async def render(workers: WorkerPool, user: str, source: str, cell: str = "", **more: Any) -> str:
    room = more.pop("room", 10_000_000)
    text, _ = await workers.run(
        user, "render", "body", source, len(source), {"a": cell}, room, decode=str, **more
    )
    return text


async def give_up(tasks: list[asyncio.Task[str]]) -> None:
    for each in tasks:
        each.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    "body",
    ["{{" + " " * 12_000, "{{" * 4_000, "{% raw %}" * 8_000, "{% if a %}" + "{{" * 4_000],
    ids=["spaces", "openings", "raw", "openings in a block"],
)
async def test_a_template_that_is_expensive_to_parse_is_refused(body: str) -> None:
    async with parser() as parsing:
        with pytest.raises(InvalidInput) as refused:
            await parsing.parse("eve", None, body, None)
        assert refused.value.reason in ("TEMPLATE_TOO_COSTLY", "TEMPLATE_INVALID")
        # The parser works on.
        await parsing.parse("eve", None, CONDITION, None)


async def test_a_parse_over_the_budget_names_the_field_and_the_limit() -> None:
    async with parser(template_budget="50ms") as parsing:
        with pytest.raises(InvalidInput, match=r"more than 50ms .*OUTBOX_TEMPLATE_BUDGET") as it:
            await parsing.parse("eve", None, None, "{{a|size}}" * 20_000)
    assert it.value.reason == "TEMPLATE_TOO_COSTLY"
    assert it.value.violations[0].field == "html"


@pytest.mark.parametrize(
    ("source", "cell"),
    [(SORTING, CELL), (DATES, "1 January 2026 12:00")],
    ids=["sorting", "dates"],
)
async def test_a_rendering_over_the_budget_is_ended_and_another_user_goes_on(
    source: str, cell: str
) -> None:
    async with pool(template_budget="300ms") as workers:
        await render(workers, "ann", CONDITION)
        evil = [asyncio.create_task(render(workers, "eve", source, cell)) for _ in range(3)]
        # Hers are done before the evil ones, of which each uses up its budget.
        for _ in range(5):
            assert await render(workers, "ann", CONDITION, "y") == "x"
        assert not all(each.done() for each in evil)
        for each in evil:
            with pytest.raises(TooCostlyError, match="300ms"):
                await each


async def test_a_text_is_stopped_at_the_limit_while_it_is_built() -> None:
    async with pool(template_workers=1) as workers:
        source = "{% for i in (1..1000) %}{{ a }}{% endfor %}"
        with pytest.raises(RenderError) as refused:
            await render(workers, "eve", source, "\u00fc" * 30_000, room=10_000_000)
        assert refused.value.reason == "MESSAGE_TOO_LARGE"
        (worker,) = workers_here()
        assert worker.peak_memory() < 150_000_000


async def test_a_user_never_holds_all_workers() -> None:
    async with pool(template_budget="1m", template_workers=3) as workers:
        await render(workers, "ann", CONDITION)
        evil = [asyncio.create_task(render(workers, "eve", SORTING, CELL)) for _ in range(6)]
        await eventually(lambda: sum(each.cpu_seconds() > 0.5 for each in workers_here()) == 2)
        assert await render(workers, "ann", CONDITION, "y") == "x"
        assert not any(each.done() for each in evil)
        await give_up(evil)


async def test_a_job_that_is_cancelled_frees_its_worker() -> None:
    async with pool(template_budget="1m", template_workers=1) as workers:
        await render(workers, "ann", CONDITION)
        (worker,) = workers_here()
        spent = worker.cpu_seconds()
        rendering = asyncio.create_task(render(workers, "eve", SORTING, CELL))
        await eventually(lambda: worker.cpu_seconds() > spent)
        await give_up([rendering])
        assert await render(workers, "ann", CONDITION, "y") == "x"
        await eventually(lambda: not worker.is_running())


async def test_a_job_that_finds_no_free_worker_ends_after_its_wait() -> None:
    async with pool(template_budget="1m", template_workers=1) as workers:
        rendering = asyncio.create_task(render(workers, "eve", SORTING, CELL))
        await eventually(workers_here)
        with pytest.raises(TimeoutError):
            await render(workers, "ann", CONDITION, wait=0.1)
        await give_up([rendering])
        assert await render(workers, "ann", CONDITION, "y", wait=120) == "x"


async def test_a_worker_that_is_killed_while_it_waits_is_replaced() -> None:
    async with pool(template_workers=1) as workers:
        await render(workers, "ann", CONDITION)
        workers_here()[0].kill()
        assert await render(workers, "ann", CONDITION, "y") == "x"


async def test_the_job_of_a_worker_that_is_killed_is_done_by_another_one() -> None:
    source = (
        '{% assign l = a | split: "," %}{% for i in (1..100) %}{{ l | sort | size }}{% endfor %}'
    )
    async with pool(template_budget="1m", template_workers=1) as workers:
        await render(workers, "ann", CONDITION)
        (worker,) = workers_here()
        spent = worker.cpu_seconds()
        rendering = asyncio.create_task(render(workers, "ann", source, CELL))
        await eventually(lambda: worker.cpu_seconds() > spent or rendering.done())
        worker.kill()
        assert await rendering == "900" * 100
        await eventually(lambda: not worker.is_running())


async def test_a_worker_has_a_limit_of_memory_and_no_secrets() -> None:
    async with pool(template_workers=1) as workers:
        await render(workers, "ann", CONDITION)
        (worker,) = workers_here()
        assert worker.memory_limit() == (256 * 1024 * 1024,) * 2
        assert not any(name.startswith("OUTBOX_") for name in worker.environment())
        # The kernel ends it before the service if the host has no memory left.
        assert worker.ended_first() == 1_000


async def test_a_template_that_needs_more_memory_than_a_worker_has_is_refused() -> None:
    source = "{% for i in (1..1000) %}{{ a }}{% endfor %}"
    async with pool(template_memory=128 * 1024 * 1024, template_workers=1) as workers:
        assert await render(workers, "ann", CONDITION, "y") == "x"
        (first,) = workers_here()
        # Thirty million characters, of four bytes each while they are collected.
        with pytest.raises(TooCostlyError, match=r"134,217,728 bytes of memory .*TEMPLATE_MEMORY"):
            await render(workers, "eve", source, "x" * 30_000, room=32_000_000)
        # Its memory is free again: another process has taken its place.
        assert await render(workers, "ann", CONDITION, "y") == "x"
        assert not first.is_running()


PARENT = f"""
import asyncio
from outbox_server.shared.settings import load_settings
from outbox_server.shared.templates.workers import WorkerPool

async def main():
    pool = WorkerPool({WORKER!r}, load_settings(template_workers=1))
    await pool.run("u", "render", "body", "{{% if a %}}{{% endif %}}", 9, {{}}, 9, decode=str)
    print("started", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_workers_end_when_their_parent_is_killed() -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    assert await parent.stdout.readline() == b"started\n"
    (worker,) = workers_of(parent.pid, WORKER)
    parent.kill()
    await parent.communicate()
    await eventually(lambda: not worker.is_running())
