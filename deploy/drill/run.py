"""Runs the load and the faults of a drill, up to the end of the last job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from outbox.v1.sender_pb2 import SMTP_SECURITY_TLS, SmtpEndpoint

from outbox_server.deploy.drill.caller import Answered
from outbox_server.deploy.drill.database import count_open_jobs, limit_users
from outbox_server.deploy.drill.faults import Faults
from outbox_server.deploy.drill.load import WINDOW, Load
from outbox_server.deploy.drill.plan import KINDS, SUSPENSIONS, Fault, plan
from outbox_server.deploy.drill.rolling import Rolled
from outbox_server.deploy.drill.stack import DrillStack
from outbox_server.deploy.drill.user_limits import LIMITS, LimitJudge
from outbox_server.deploy.ports import LOOPBACK

# After a fault, a mail must be begun within this time, and the process that was hit must serve. The
# time of an outage or a restore meanwhile does not count. Most of it is the start of Python, which
# took 40 s at a load of 20 on two cores.
RECOVERY_LIMIT_S: Final = 90.0
_POLL_S: Final = 0.02
# If no job ends for this long at the end of the drill, no job will end any more.
_STANDSTILL_S: Final = 60.0
_ANSWER_LIMIT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Struck:
    """An injected fault. `recovery_s` is None if the stack did not recover in RECOVERY_LIMIT_S."""

    fault: Fault
    recovery_s: float | None
    # What was missing then.
    missing: str = ""


@dataclass
class DrillOutcome:
    """The result of a drill, before its audit."""

    answered: Answered
    rolled: Rolled = field(default_factory=Rolled)
    faults: list[Struck] = field(default_factory=list)
    # Jobs that were not in a final state when none changed any more.
    open_jobs: int = 0
    # Mails that the SMTP side permanently refused: as many jobs may be FAILED.
    refused: int = 0
    # Mails that were sent although they were held, one line per restore.
    held_and_sent: list[str] = field(default_factory=list)
    # The limits of users that were exceeded, one per line.
    over_limits: list[str] = field(default_factory=list)
    # Whether an upload was never answered, not even after the last fault was over.
    unanswered: bool = False
    seconds: float = 0.0


class Drill:
    """Injects planned faults into a stack under load, and reports each to `say`."""

    def __init__(
        self,
        stack: DrillStack,
        *,
        seed: int,
        names: list[str],
        seconds: float,
        say: Callable[[str], None],
        limited: bool = False,
    ) -> None:
        """If `limited`, some users have limits for all their senders together."""
        self._limited = limited
        self._stack = stack
        self._judge = LimitJudge(WINDOW)
        self._faults = Faults(stack, say, self._judge)
        # Plan with all kinds, so that kinds that are missing here do not change the others.
        faults = plan(seed, seconds, names, stack.processes)
        self._plan = [fault for fault in faults if fault.name not in stack.missing]
        self._seconds = seconds
        self._say = say
        self._load = Load(
            seed,
            stack.schedulers,
            arrived=stack.inbox.mails,
            refused=stack.inbox.refused,
            endpoint=SmtpEndpoint(
                host=LOOPBACK, port=stack.proxies["endpoint"].port, security=SMTP_SECURITY_TLS
            ),
            credentials=stack.credentials,
        )
        self._began = time.monotonic()
        # How many faults of SUSPENSIONS last, and when the last one was over (Unix time).
        self._suspensions = 0
        self._suspended_until = 0.0

    async def run(self, over: asyncio.Event | None = None) -> DrillOutcome:
        """Inject the planned faults, undo them all, and wait for the end of the last job.

        `over` ends the load before its time.
        """
        over = over or asyncio.Event()
        if self._limited:
            await limit_users(self._stack.system.servers.database_url, LIMITS)
        self._began = time.monotonic()
        outcome = DrillOutcome(self._load.answered, self._faults.rolled)
        stop = asyncio.Event()
        loading = asyncio.create_task(self._load.run(stop))
        try:
            async with asyncio.TaskGroup() as group:
                struck = [group.create_task(self._strike(fault)) for fault in self._plan]
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, self._seconds - self._now())):
                        await over.wait()
            # The last recoveries need mail, so the load goes on until then.
            stop.set()
            outcome.faults = [one.result() for one in struck]
            outcome.answered.add(self._faults.hostile.answered)
            outcome.answered.add(self._faults.operator.answered)
            self._stack.heal()
            done, _ = await asyncio.wait({loading}, timeout=_ANSWER_LIMIT_S)
            outcome.unanswered = not done
        finally:
            loading.cancel()
            with suppress(asyncio.CancelledError):
                await loading
        self._say("all faults are over; waiting for the last job")
        outcome.open_jobs = await self._until_final()
        mails = self._stack.inbox.mails
        if self._limited:
            outcome.over_limits = list(self._judge.broken(mails, self._load.user_of))
        outcome.held_and_sent = self._faults.restoring.problems
        outcome.refused = len(self._stack.inbox.refused)
        outcome.seconds = time.monotonic() - self._began
        return outcome

    async def _strike(self, fault: Fault) -> Struck:
        await self._until(fault.at)
        kind = KINDS[fault.name]
        several = self._stack.processes.get(kind.strikes, 1) > 1
        which = f" {fault.number}" if several else ""
        variant = f" ({fault.variant})" if fault.variant else ""
        lasts = f", for {fault.lasts:.1f} s" if fault.lasts else ""
        self._say(f"{self._now():7.2f} s  {fault.name}{which}: {kind.text}{variant}{lasts}")
        suspends = fault.name in SUSPENSIONS
        self._suspensions += suspends
        ended = await self._faults.strike(fault)
        self._suspensions -= suspends
        if suspends:
            self._suspended_until = ended
        missing = await self._missing_in_the_end(fault, ended)
        if missing:
            self._say(f"{self._now():7.2f} s  {fault.name}{which}: {missing}")
            return Struck(fault, None, missing)
        # The time of an outage meanwhile counts for the outage.
        recovery = time.time() - max(ended, self._suspended_until)
        self._say(f"{self._now():7.2f} s  {fault.name}{which}: recovered after {recovery:.2f} s")
        return Struck(fault, recovery)

    async def _missing_in_the_end(self, fault: Fault, ended: float) -> str:
        """Wait for the recovery. Return what is still missing at its time limit, or nothing."""
        left, before = RECOVERY_LIMIT_S, time.monotonic()
        while missing := await self._missing_after(fault, ended):
            await asyncio.sleep(_POLL_S)
            now = time.monotonic()
            if not self._suspensions:
                left -= now - before
            before = now
            if left < 0:
                return missing
        return ""

    async def _missing_after(self, fault: Fault, ended: float) -> str:
        """Return what is missing after a fault: a mail, or the process that it hit."""
        mails = self._stack.inbox.mails
        if not mails or mails[-1].started_at <= ended:
            return "no mail was begun"
        name = KINDS[fault.name].strikes
        if name in self._stack.processes:
            service = self._stack.service(name, fault.number)
            if not await service.serving():
                return f"{service.title} did not serve"
        return ""

    async def _until_final(self) -> int:
        """Wait until no job is open or none ends any more; return how many are open."""
        left, since = await self._open_jobs(), time.monotonic()
        while left and time.monotonic() - since < _STANDSTILL_S:
            await asyncio.sleep(0.2)
            now = await self._open_jobs()
            if now != left:
                left, since = now, time.monotonic()
        return left

    async def _open_jobs(self) -> int:
        return await count_open_jobs(self._stack.system.servers.database_url)

    def _now(self) -> float:
        return time.monotonic() - self._began

    async def _until(self, second: float) -> None:
        await asyncio.sleep(max(0.0, second - self._now()))
