"""Mail through each simulated provider while dispatchers are killed, checked by its counts.

Every mail is accepted once. Copies exist only of mails that were in doubt at a kill. A job is
FAILED only if the provider refuses its mail permanently.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import pytest

from outbox_server.deploy.providers.catalog import (
    IONOS,
    PLAIN,
    POSTGREY,
    SES,
    SHARED_HOST,
    SLOW_SCANNER,
    STRICT_POSTFIX,
)
from outbox_server.deploy.providers.google import GMAIL, WORKSPACE_RELAY
from outbox_server.deploy.providers.microsoft import EXCHANGE_ONLINE
from outbox_server.deploy.providers.profile import DAY_S, HOUR_S, MINUTE_S, Profile
from outbox_server.deploy.providers.sasl import Account
from outbox_server.deploy.providers.server import Provider
from outbox_server.shared.states import JobState
from tests.dispatchers import DispatcherProcess, options, settings_of
from tests.eventually import PATIENCE, eventually
from tests.world import World, jobs_in

CONCURRENCY: Final = 5
SENDERS: Final = 3
USER: Final = "outbox"
# The number of recipients of each sender that a provider refuses permanently.
UNKNOWN: Final = 2
KILLS: Final = 2


@dataclass(frozen=True)
class Case:
    """A provider with few mails and a compressed day, so that the test takes seconds."""

    profile: Profile
    mails: int
    # Settings of the dispatchers, as text.
    settings: Mapping[str, str] = field(default_factory=dict)


def periods(profile: Profile, **most_and_seconds: tuple[int, float]) -> Profile:
    """Return a profile with other values for its `minute`, `hour` or `day`."""
    names = {MINUTE_S: "minute", HOUR_S: "hour", DAY_S: "day", 1.0: "second"}
    return dataclasses.replace(
        profile,
        rates=tuple(
            dataclasses.replace(rate, most=changed[0], seconds=changed[1])
            for rate in profile.rates
            if (changed := most_and_seconds.get(names[rate.seconds])) is not None
        ),
    )


COOLDOWN: Final = {"cooldown": "300ms,600ms", "quota_day": "2s"}
CASES: Final[Mapping[str, Case]] = {
    "plain": Case(PLAIN, 120),
    # Slower than the lease, but within the time limit for the reply to a body.
    "slow-scanner": Case(dataclasses.replace(SLOW_SCANNER, reply_delay_s=3.0), 20),
    "strict-postfix": Case(STRICT_POSTFIX, 60),
    "shared-host": Case(periods(SHARED_HOST, hour=(60, 2.0)), 90, COOLDOWN),
    "ionos": Case(periods(IONOS, hour=(60, 2.0)), 90, COOLDOWN),
    "gmail": Case(periods(GMAIL, minute=(20, 0.5), day=(45, 2.0)), 75, COOLDOWN),
    "workspace-relay": Case(
        periods(WORKSPACE_RELAY, minute=(20, 0.5), day=(15, 2.0)), 75, COOLDOWN
    ),
    "exchange-online": Case(
        periods(EXCHANGE_ONLINE, minute=(20, 0.5), day=(45, 2.0)), 75, COOLDOWN
    ),
    "ses": Case(periods(SES, second=(3, 0.1), day=(45, 2.0)), 75, COOLDOWN),
    # The greylisting delay is longer than the backoff of failed attempts.
    "postgrey": Case(POSTGREY.scaled(0.01), 60, {"defer_backoff": "500ms,500ms,1s"}),
}
# For a longer run by hand: multiplies the mails, through one provider or several (-k gmail).
TIMES: Final = int(os.environ.get("OUTBOX_TEST_PROVIDER_TIMES", "1"))
PATIENCE_S: Final = PATIENCE * TIMES


@pytest.fixture
def values_for(database_url: str, redis_url: str) -> Callable[[str, Case], dict[str, str]]:
    def build(url: str, case: Case) -> dict[str, str]:
        given: dict[str, Any] = {
            "lease": "2s",
            "smtp_timeout": "10s",
            "dispatcher_concurrency": CONCURRENCY,
        }
        return options(database_url, redis_url, url, **given | dict(case.settings))

    return build


class Dispatchers:
    """Two dispatchers; one at a time is killed and started again."""

    def __init__(self, values: dict[str, str], folder: Path) -> None:
        self._running = [
            DispatcherProcess(values, folder / f"dispatcher-{number}.log") for number in (1, 2)
        ]

    async def __aenter__(self) -> Self:
        for one in self._running:
            await one.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for one in self._running:
            if one.is_running():
                await one.kill()

    async def serving(self) -> None:
        for one in self._running:
            await eventually(one.serving)

    async def kill_one(self, number: int) -> None:
        """Kill one with -9 and start it again."""
        one = self._running[number % len(self._running)]
        await one.kill()
        await one.start()


@pytest.mark.parametrize("name", tuple(CASES))
async def test_every_mail_is_accepted_once_although_dispatchers_are_killed(
    name: str, values_for: Callable[[str, Case], dict[str, str]], tmp_path: Path
) -> None:
    case = dataclasses.replace(CASES[name], mails=CASES[name].mails * TIMES)
    provider = Provider(case.profile, accounts={USER: Account("secret")})
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(provider)
        # Without TLS: other tests cover TLS and AUTH.
        login = USER if case.profile.requires_auth else ""
        values = values_for(provider.url(login), case)
        world = await stack.enter_async_context(World(settings_of(values)))
        jobs, unknown = await scheduled(world, case.mails)
        dispatchers = await stack.enter_async_context(Dispatchers(values, tmp_path))
        await dispatchers.serving()
        await world.loader.load(sorted(await senders_of(world)), committed=True)
        for kill in range(1, KILLS + 1):
            # While mail is being sent, at even intervals.
            enough = case.mails * kill // (KILLS + 1)
            await eventually(partial(has_accepted, world, provider, enough), PATIENCE_S)
            await dispatchers.kill_one(kill)
        await eventually(world.done, PATIENCE_S)
        await check_states(world, provider, jobs=jobs, unknown=unknown)


async def has_accepted(world: World, provider: Provider, mails: int) -> bool:
    """Return whether that many mails were accepted, or all jobs ended; `check_states` tells why."""
    return provider.tally.accepted >= mails or await world.done()


async def scheduled(world: World, mails: int) -> tuple[set[int], set[int]]:
    """Schedule mails of all senders; return all jobs, and the jobs with an unknown recipient."""
    jobs: list[int] = []
    unknown: set[int] = set()
    for _ in range(SENDERS):
        sender = await world.sender()
        own = await world.schedule(sender, mails // SENDERS, load=False)
        jobs += own
        unknown |= set(own[-UNKNOWN:])
    await world.sql(
        "UPDATE email_jobs SET recipient = 'unknown' || id || '@y.test' WHERE id = ANY(%s)",
        sorted(unknown),
    )
    return set(jobs), unknown


async def senders_of(world: World) -> set[int]:
    return {row.id for row in await world.sql("SELECT id FROM senders")}


async def check_states(
    world: World, provider: Provider, *, jobs: set[int], unknown: set[int]
) -> None:
    """Compare the states of the jobs with the mails that the provider counted."""
    tally = provider.tally
    accepted = jobs_in(tally.mails)
    failed = await world.in_state(JobState.FAILED)
    assert failed == unknown, await reasons(world, failed - unknown)
    assert set(accepted) == jobs - unknown
    assert await world.in_state(JobState.SENT) == jobs - unknown
    # An expired lease belongs to a killed dispatcher: its mail was in doubt.
    doubtful = {
        row.id
        for row in await world.sql(
            "SELECT DISTINCT email_job_id AS id FROM attempts WHERE outcome = 6"
        )
    }
    copied = {job for job, times in accepted.items() if times > 1}
    assert copied <= doubtful
    assert tally.copies == accepted.total() - len(accepted)
    assert tally.copies <= KILLS * CONCURRENCY
    assert len(doubtful) <= KILLS * CONCURRENCY
    await world.check_counts()


async def reasons(world: World, jobs: set[int]) -> Counter[str]:
    """Return the reasons of failed jobs, for the message of a failing test."""
    rows = await world.sql(
        "SELECT smtp_code, enhanced_code, message FROM attempts WHERE email_job_id = ANY(%s)",
        sorted(jobs),
    )
    return Counter(f"{row.smtp_code} {row.enhanced_code} {row.message}" for row in rows)
