"""Injects each kind of fault into a running stack, and undoes it."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final

import redis.asyncio
from redis.exceptions import RedisError

from outbox_server.deploy.child import Child
from outbox_server.deploy.drill.clocks import HOW_TO_GET, clock_off_by, faketime_library, set_clock
from outbox_server.deploy.drill.database import (
    are_loaded,
    end_connections,
    fail_writes,
    heal_writes,
    markers_of,
)
from outbox_server.deploy.drill.hostile import HOSTILE_USER, HostileUser
from outbox_server.deploy.drill.operator import OPERATOR, DrillOperator
from outbox_server.deploy.drill.plan import LAG_S, LEASE_S, Fault
from outbox_server.deploy.drill.provider_troubles import PROVIDER_TROUBLES
from outbox_server.deploy.drill.restoring import Restoring
from outbox_server.deploy.drill.rolling import RollingRestart
from outbox_server.deploy.drill.split_brain import SplitBrain
from outbox_server.deploy.drill.stack import DrillStack
from outbox_server.deploy.drill.user_limits import LIMITS, TIGHTER_LIMITS, LimitJudge
from outbox_server.deploy.drill.waiting import until
from outbox_server.deploy.embedded.passwords import SUPERUSER
from outbox_server.deploy.embedded.proxy import TcpProxy
from outbox_server.deploy.embedded.service import Service
from outbox_server.deploy.embedded.trouble import InboxTrouble, Way
from outbox_server.shared.queue.user_limits import UserSendLimits

# If another fault has just killed a server, wait this long until it runs again.
_PATIENCE_S: Final = 30.0
# Writes must work again within this time, even if a paused or killed process holds a table's lock.
_HEAL_LIMIT_S: Final = 120.0
# The longest wait for a service to start, which does not report SERVING without PostgreSQL.
_START_LIMIT_S: Final = 30.0
_HOUR_S: Final = {"ahead": 3600.0, "behind": -3600.0}
# The trouble of each fault, with its phase if the fault has no variants.
_TROUBLES: Final = {
    "smtp_stall": InboxTrouble(Way.HANG),
    "smtp_silent": InboxTrouble(Way.CLOSE, "reply"),
    "smtp_421": InboxTrouble(Way.REFUSE, text="421 4.3.2 closing"),
    "smtp_450": InboxTrouble(Way.REFUSE, text="450 4.2.1 busy"),
    "smtp_552": InboxTrouble(Way.REFUSE, text="552 5.2.2 mailbox full"),
    "smtp_auth": InboxTrouble(Way.REFUSE, "auth", "535 5.7.8 wrong"),
    "smtp_bytes": InboxTrouble(Way.PIECES),
    "smtp_line": InboxTrouble(Way.LONG),
}


class Faults:
    """Injects faults into one stack."""

    def __init__(self, stack: DrillStack, say: Callable[[str], None], judge: LimitJudge) -> None:
        """`judge` is called with each change of a user's limits."""
        self._stack = stack
        self._judge = judge
        grace_s = stack.settings.shutdown_grace.total_seconds()
        self._rolling = RollingRestart(stack.system, grace_s, say)
        self.rolled = self._rolling.rolled
        self._writes = asyncio.Lock()
        known = stack.credentials
        self.hostile = HostileUser(
            stack.schedulers,
            None if known is None else known[HOSTILE_USER],
            stack.proxies["endpoint"].port,
        )
        self.operator = DrillOperator(stack.schedulers, None if known is None else known[OPERATOR])
        self.restoring = Restoring(stack, self.operator, self._writes)
        split_brain = SplitBrain(stack, self._restart)
        self._ways: Mapping[str, Callable[[Fault], Awaitable[None]]] = {
            "redis_flush": self._flush,
            "redis_kill": self._kill_redis,
            "redis_snapshot": self._restore_snapshot,
            "redis_keys": self._delete_keys,
            "redis_full": self._fill,
            "redis_clock": self._step_back,
            "dispatcher_clock": self._shift_clock,
            "postgres_kill": self._kill_postgres,
            "postgres_restart": self._restart_postgres,
            "postgres_cut": self._cut_postgres,
            "postgres_full": self._fill_disk,
            "postgres_conflict": self._conflict,
            "endpoint_slow": self._slow_down,
            "endpoint_certificate": self._distrust,
            "rolling_restart": self._roll,
            "user_hostile": self._attack,
            "user_limits": self._tighten,
            "redis_split": lambda fault: split_brain.split(fault.lasts),
            "postgres_restore": lambda fault: self.restoring.restore(fault.lasts),
            **({} if stack.stores is None else stack.stores.ways),
        }

    async def strike(self, fault: Fault) -> float:
        """Inject a fault for its duration, undo it, and return the time at which it was over."""
        target, _, way = fault.name.partition("_")
        if fault.name in self._ways:
            await self._ways[fault.name](fault)
        elif (fault.name, fault.variant) in PROVIDER_TROUBLES:
            profile = PROVIDER_TROUBLES[fault.name, fault.variant]
            await self._trouble(InboxTrouble(Way.PROVIDER, profile=profile), fault.lasts)
        elif fault.name in _TROUBLES:
            trouble = _TROUBLES[fault.name]
            phase = fault.variant or trouble.phase
            await self._trouble(dataclasses.replace(trouble, phase=phase), fault.lasts)
        elif way in ("refuse", "hang", "outage"):
            proxy = self._stack.proxies[target]
            cut_after = target in ("smtp", "endpoint")
            await self._disconnect(proxy, way, fault.lasts, cut_after=cut_after)
        else:
            await self._strike_service(self._stack.service(target, fault.number), way, fault.lasts)
        return time.time()

    async def _strike_service(self, service: Service, way: str, lasts: float) -> None:
        if way != "pause":
            service.child.signal(signal.SIGKILL if way == "kill" else signal.SIGTERM)
            return
        service.child.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(lasts)
        finally:
            service.child.signal(signal.SIGCONT)

    async def _disconnect(
        self, proxy: TcpProxy, way: str, lasts: float, *, cut_after: bool
    ) -> None:
        if way == "hang":
            proxy.hang()
        else:
            proxy.refuse()
        try:
            await asyncio.sleep(lasts)
        finally:
            if cut_after:
                # Bytes that were held back were sent long ago. If they arrived now, the inbox
                # would record wrong times for them.
                proxy.cut()
            proxy.heal()

    async def _trouble(self, trouble: InboxTrouble, lasts: float) -> None:
        inbox = self._stack.inbox
        inbox.trouble = trouble
        if trouble.of_connections:
            inbox.cut()
        try:
            await asyncio.sleep(lasts)
        finally:
            inbox.trouble = None
            if trouble.way is Way.HANG:
                # Hanging connections never end by themselves.
                inbox.cut()

    async def _slow_down(self, fault: Fault) -> None:
        proxy = self._stack.proxies["endpoint"]
        proxy.lag(LAG_S)
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            proxy.heal()

    async def _distrust(self, fault: Fault) -> None:
        self._stack.distrust()
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            self._stack.trust()

    async def _shift_clock(self, fault: Fault) -> None:
        service = self._stack.service("dispatcher", fault.number)
        library = faketime_library()
        if library is None:
            raise RuntimeError(HOW_TO_GET)
        offset_s = _HOUR_S[fault.variant]
        await self._restart(service, clock_off_by(library, offset_s))
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            await self._restart(service, {})

    async def _attack(self, fault: Fault) -> None:
        await self.hostile.attack(fault.variant, fault.lasts)

    async def _tighten(self, fault: Fault) -> None:
        await self._set_limits(fault.variant, TIGHTER_LIMITS[fault.variant])
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            # Last, because the audit judges all mail that follows by the limits of the end.
            await self._set_limits(fault.variant, LIMITS[fault.variant])

    async def _set_limits(self, user: str, limits: UserSendLimits) -> None:
        servers = self._stack.system.servers
        markers: list[int] = []

        async def noted() -> bool:
            found = await markers_of(servers.database_url, user)
            markers[:] = found or []
            return found is not None

        asked = time.time()
        await self.operator.set_limits(user, limits)
        await until(noted, _HEAL_LIMIT_S)
        await until(lambda: are_loaded(servers.database_url, markers), _HEAL_LIMIT_S)
        # A mail that was claimed before may begin as long as its lease lasts.
        self._judge.change(user, limits, asked=asked, settled=time.time() + LEASE_S)

    async def _roll(self, _: Fault) -> None:
        await self._rolling.run()

    async def _restart(self, service: Service, more: Mapping[str, str]) -> None:
        service.begin_with(more)
        # If another fault has just killed the service, it is started before or after this.
        old = service.child.pid
        service.child.signal(signal.SIGTERM)

        async def again() -> bool:
            if service not in self._stack.system.services:
                return True  # a rolling restart has replaced it meanwhile
            return service.child.pid != old and await service.serving()

        # If it takes longer, the wait for the recovery reports it.
        with suppress(TimeoutError):
            await until(again, _START_LIMIT_S)

    # Redis -----------------------------------------------------------------------------------

    async def _flush(self, _: Fault) -> None:
        await self._redis(lambda client: client.flushall())

    async def _kill_redis(self, _: Fault) -> None:
        self._stack.valkey.child.signal(signal.SIGKILL)

    async def _restore_snapshot(self, fault: Fault) -> None:
        valkey = self._stack.valkey
        before = valkey.child
        await self._redis(lambda client: client.save())
        try:
            await asyncio.sleep(fault.lasts)
            before.signal(signal.SIGKILL)
            await until(lambda: self._runs_after(before), _PATIENCE_S)
        finally:
            (valkey.folder / "dump.rdb").unlink(missing_ok=True)

    async def _delete_keys(self, fault: Fault) -> None:
        chance = random.Random(fault.at)

        async def delete(client: redis.asyncio.Redis) -> None:
            keys = sorted([key async for key in client.scan_iter(count=1000)])
            gone = [key for key in keys if chance.random() < 0.5]  # noqa: PLR2004 - half of them
            if gone:
                await client.delete(*gone)

        await self._redis(delete)

    async def _fill(self, fault: Fault) -> None:
        # The server is started without an eviction policy, so writes fail and no key is evicted.
        await self._redis(lambda client: client.config_set("maxmemory", 1))
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            await self._redis(lambda client: client.config_set("maxmemory", 0))

    async def _step_back(self, fault: Fault) -> None:
        file = self._stack.redis_clock
        step_s = float(fault.variant.removesuffix("s"))
        set_clock(file, -step_s)
        try:
            # The process reads the file now and then.
            with suppress(TimeoutError):
                await until(lambda: self._is_behind(step_s / 2), _PATIENCE_S)
            await asyncio.sleep(fault.lasts)
        finally:
            # After a step forward, limits would end too early. So Redis starts empty afterwards.
            child = self._stack.valkey.child
            child.signal(signal.SIGSTOP)
            set_clock(file, 0)
            child.signal(signal.SIGKILL)

    async def _is_behind(self, seconds: float) -> bool:
        async with redis.asyncio.Redis.from_url(self._stack.valkey.url) as client:
            try:
                whole, micros = await client.time()
            except (RedisError, OSError):
                return False
        return whole + micros / 1e6 < time.time() - seconds

    async def _runs_after(self, before: Child) -> bool:
        return self._stack.valkey.child is not before and await self._asked(
            lambda client: client.ping()
        )

    async def _redis(self, ask: Callable[[redis.asyncio.Redis], Awaitable[object]]) -> None:
        await until(lambda: self._asked(ask), _PATIENCE_S)

    async def _asked(self, ask: Callable[[redis.asyncio.Redis], Awaitable[object]]) -> bool:
        async with redis.asyncio.Redis.from_url(self._stack.valkey.url) as client:
            try:
                await ask(client)
            except (RedisError, OSError):
                return False
        return True

    # PostgreSQL ------------------------------------------------------------------------------

    async def _kill_postgres(self, _: Fault) -> None:
        # Do not use the server's `kill`, which waits: the stack starts it again at once.
        self._stack.postgres.child.signal(signal.SIGKILL)

    async def _restart_postgres(self, _: Fault) -> None:
        self._stack.postgres.child.signal(signal.SIGQUIT)

    async def _cut_postgres(self, _: Fault) -> None:
        await until(
            lambda: end_connections(self._stack.postgres.url("postgres", SUPERUSER)), _PATIENCE_S
        )

    async def _fill_disk(self, fault: Fault) -> None:
        await self._fail_writes("53100", 1.0, fault.lasts)

    async def _conflict(self, fault: Fault) -> None:
        await self._fail_writes(fault.variant, 1 / 3, fault.lasts)

    async def _fail_writes(self, state: str, share: float, lasts: float) -> None:
        # A replica may take over meanwhile, which has its own address.
        servers = self._stack.system.servers
        # A slow fault of this kind may overlap with the next one.
        async with self._writes:
            try:
                with suppress(TimeoutError):
                    await until(
                        lambda: fail_writes(servers.database_url, state, share), _PATIENCE_S
                    )
                await asyncio.sleep(lasts)
            finally:
                await until(lambda: heal_writes(servers.database_url), _HEAL_LIMIT_S)
