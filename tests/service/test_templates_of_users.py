"""Eve's templates cost as much as they can; Ann's mail and calls go on as without them."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import grpc
import pytest
from outbox.v1.batch_service_pb2 import ScheduleBatchRequest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.ports import free_port
from outbox_server.shared.states import JobState
from tests.dispatchers import options, process, running, settings_of
from tests.eventually import PATIENCE, eventually
from tests.scheduler_stack import options_for
from tests.scraping import scrape
from tests.two_users import give_up, p99, rivals, whose_limit
from tests.worker_processes import WORKER, workers_here, workers_of
from tests.world import World, jobs_in

CONDITION = "{% if a %}Dear {{ a | upcase }}{% endif %}"
SORTING = (
    '{% assign l = a | split: "," %}{% for i in (1..1000) %}'
    "{% assign m = l | sort | reverse | uniq %}{% endfor %}x"
)
LIST = ",".join(f"item{n}" for n in range(900))

# Below this, a difference of times is noise of a busy machine, in seconds. The order in which work
# ends shows the shares on any machine.
NOISE = 15.0

Configure = Callable[..., dict[str, str]]


@pytest.fixture
def configure(database_url: str, redis_url: str, inbox: Inbox) -> Configure:
    def build(**changes: str | int) -> dict[str, str]:
        usual: dict[str, str | int] = {"dispatcher_concurrency": 10, "lease": "60s"}
        return options(database_url, redis_url, inbox.url, **usual | changes)

    return build


async def schedule(
    world: World, sender: int, body: str, cell: str, *, n: int = 1, html: str = "", **more: Any
) -> list[int]:
    """Accept a batch whose rows have one value, without a check of its template."""
    jobs = await world.schedule(sender, n, load=False, **more)
    await world.sql(
        "UPDATE batches SET body = %s, html = %s, variable_names = ARRAY['a'] WHERE id ="
        " (SELECT batch_id FROM email_jobs WHERE id = %s)",
        body,
        html or None,
        jobs[0],
    )
    await world.sql(
        "UPDATE email_jobs SET variables = %s WHERE id = ANY(%s)", json.dumps([cell]), jobs
    )
    await world.loader.load([sender], committed=True)
    return jobs


async def lateness(world: World, senders: Mapping[str, int], n: int = 20) -> float:
    """Send mails with each body by its sender.

    Return the 99th percentile of their lateness, in seconds.
    """
    jobs: list[int] = []
    for body, sender in senders.items():
        spacing = timedelta(milliseconds=50)
        jobs += await schedule(world, sender, body, "Ann", n=n, spacing=spacing)
    await eventually(lambda: world.done(*senders.values()))
    rows = await world.sql(
        "SELECT late_ms FROM attempts WHERE email_job_id = ANY(%s) ORDER BY 1", jobs
    )
    assert len(rows) == len(jobs)
    return float(rows[int(len(rows) * 0.99) - 1].late_ms) / 1_000


async def test_expensive_mails_of_one_user_make_no_mail_of_another_late(
    configure: Configure,
) -> None:
    settings = settings_of(configure(template_budget="200ms"))
    async with World(settings) as world, running(settings):
        ann = {body: await world.sender(user="ann") for body in ("Dear {{ a }}", CONDITION)}
        evil = [await world.sender(user="eve") for _ in range(4)]
        await lateness(world, ann, 2)
        quiet = await lateness(world, ann)
        costly: list[int] = []
        for sender in evil:
            costly += await schedule(world, sender, SORTING, LIST, n=10)
        await eventually(lambda: workers_here(WORKER))
        loaded = await lateness(world, ann)
        # Eve's mails were being built all the time. Without shares, Ann's would have come last.
        assert not await world.done(*evil)
        assert loaded < max(2 * quiet, NOISE)
        assert await world.states(*ann.values()) == {JobState.SENT: 84}

        failed = await eventually(lambda: world.in_state(JobState.FAILED))
        assert failed <= set(costly)
        for job in failed:
            [attempt] = await world.attempts(job)
            assert str(attempt.message).startswith(
                "TEMPLATE_TOO_COSTLY: building this mail needs more than 200ms of processor time"
            )


async def test_a_mail_that_grows_beyond_the_limit_is_stopped_in_a_worker(
    configure: Configure,
) -> None:
    settings = settings_of(configure())
    loop = "{% for i in (1..1000) %}{{ a }}{% endfor %}"
    async with World(settings) as world, running(settings):
        eve = await world.sender(user="eve")
        [job] = await schedule(world, eve, loop, "\u00fc" * 30_000, html=loop)
        await eventually(lambda: world.done(eve))
        [attempt] = await world.attempts(job)
        assert str(attempt.message).startswith("MESSAGE_TOO_LARGE: ")
        assert all(each.peak_memory() < 200_000_000 for each in workers_here(WORKER))


async def test_a_mail_whose_worker_is_killed_is_sent_once(
    configure: Configure, inbox: Inbox
) -> None:
    settings = settings_of(configure(template_budget="1m", template_workers=1))
    sort = '{% assign l = a | split: "," %}{% for i in (1..200) %}{{ l | sort | size }}{% endfor %}'
    async with World(settings) as world, running(settings):
        ann = await world.sender(user="ann")
        await lateness(world, {CONDITION: ann}, 1)
        (worker,) = workers_here(WORKER)
        spent = worker.cpu_seconds()
        [job] = await schedule(world, ann, sort, LIST)
        await eventually(lambda: worker.cpu_seconds() > spent)
        worker.kill()
        await eventually(lambda: world.done(ann))
        assert [each.outcome for each in await world.attempts(job)] == [1]
        assert jobs_in(inbox.mails)[job] == 1


async def test_mails_that_find_no_worker_return_to_the_queue_and_are_sent_later(
    configure: Configure,
) -> None:
    listen = f"127.0.0.1:{free_port()}"
    settings = settings_of(configure(lease="10s", template_workers=1, metrics_listen=listen))
    async with World(settings) as world, running(settings):
        senders = [await world.sender() for _ in range(2)]
        await lateness(world, {CONDITION: senders[0]}, 1)
        (worker,) = workers_here(WORKER)
        worker.signal(signal.SIGSTOP)
        for sender in senders:
            await schedule(world, sender, CONDITION, "Ann")

        async def one_has_returned() -> bool:
            return (await scrape(listen)).value("outbox_waits_total", cause="dispatcher") > 0

        await eventually(one_has_returned)
        assert (await world.states())[JobState.SENT] == 1
        worker.signal(signal.SIGCONT)
        await eventually(lambda: world.done(*senders))
        assert await world.states() == {JobState.SENT: 3}


async def test_on_sigterm_mails_that_are_being_built_return_to_the_queue(
    configure: Configure,
) -> None:
    settings = settings_of(configure(template_workers=1))
    async with World(settings) as world:
        ann = await world.sender()
        async with running(settings):
            await lateness(world, {CONDITION: ann}, 1)
            (worker,) = workers_here(WORKER)
            worker.signal(signal.SIGSTOP)
            # One is in the worker, and two wait for it.
            jobs = set(await schedule(world, ann, CONDITION, "Ann", n=3))
            await eventually(lambda: is_sending(world, jobs))
        assert await world.in_state(JobState.SCHEDULED) == jobs
        assert {(await world.job(job)).attempt for job in jobs} == {0}


async def is_sending(world: World, jobs: set[int]) -> bool:
    return await world.in_state(JobState.SENDING) == jobs


async def test_workers_end_with_a_dispatcher_that_is_killed(
    configure: Configure, tmp_path: Any
) -> None:
    values = configure(template_budget="1m")
    async with World(settings_of(values)) as world, process(values, tmp_path / "log") as dispatcher:
        await schedule(world, await world.sender(), CONDITION, "Ann")
        assert dispatcher.process.pid is not None
        pid = dispatcher.process.pid
        workers = await eventually(lambda: workers_of(pid, WORKER))
        await dispatcher.kill()
        await eventually(lambda: not any(each.is_running() for each in workers))


async def test_batches_with_expensive_templates_delay_no_batch_of_another_user(
    database_url: str, redis_url: str
) -> None:
    bodies = ["{{" + " " * 12_000, "{% if a %}" + "{{" * 4_000, "{% raw %}" * 8_000]
    async with rivals(database_url, redis_url) as both:
        hers, evil = await both.sender(both.ann), await both.sender(both.eve)

        async def call() -> None:
            await both.scheduler.batches.ScheduleBatch(
                ScheduleBatchRequest(
                    options=options_for(hers, body=CONDITION, subject="Hello {{ a | upcase }}"),
                    csv=b"email,a\na@b.org,Ann\n",
                ),
                metadata=both.ann,
                timeout=PATIENCE,
            )

        reasons: Counter[str] = Counter()

        async def attack(body: str) -> None:
            request = ScheduleBatchRequest(csv=b"email,a\na@b.org,x\n")
            while True:
                request.options.CopyFrom(options_for(evil, body=body))
                try:
                    await both.scheduler.batches.ScheduleBatch(
                        request, metadata=both.eve, timeout=PATIENCE
                    )
                except grpc.aio.AioRpcError as error:
                    reasons[whose_limit(error)[0]] += 1

        await call()
        quiet = await p99(call, 15)
        attacks = [asyncio.ensure_future(attack(body)) for body in bodies * 4]
        await eventually(lambda: reasons["TEMPLATE_TOO_COSTLY"])
        before = reasons["TEMPLATE_TOO_COSTLY"]
        loaded = await p99(call, 15)
        meanwhile = reasons["TEMPLATE_TOO_COSTLY"] - before
        assert not any(each.done() for each in attacks)
        await give_up(attacks)
        # Without shares, each of Ann's 15 calls would have come after several of Eve's.
        assert meanwhile < 30
        assert loaded < max(2 * quiet, NOISE)
