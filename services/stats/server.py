"""Wires the stats process together, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Final

from outbox.v1 import stats_service_pb2, stats_service_pb2_grpc

from outbox_server.services.serving import open_process
from outbox_server.services.stats import storage
from outbox_server.services.stats.folding import fold_until_stopped
from outbox_server.services.stats.metrics import StatsMetrics
from outbox_server.services.stats.servicers import StatsServicer
from outbox_server.shared.agreed.run import AgreedRun, run_agreed
from outbox_server.shared.database.engine import DATABASE_ERRORS, create_engine
from outbox_server.shared.fair_shares import FairShares
from outbox_server.shared.forecast.pace import Rules
from outbox_server.shared.retention.purging import Purger
from outbox_server.shared.rpc.probes import open_probes
from outbox_server.shared.rpc.server import ServiceBinding
from outbox_server.shared.rpc.watching import Watch
from outbox_server.shared.settings import Settings

# Methods that read and compute much. They have few places, so that most connections and processor
# time remain for other calls.
_COSTLY: Final = ("ForecastBatch", "AuditSender")
_AT_ONCE: Final = 4
_WAITING: Final = 100


async def serve(
    settings: Settings, stop: asyncio.Event, *, ready: Callable[[int], None] | None = None
) -> None:
    """Serve until `stop` is set. `ready` is called with the port once it is bound.

    The process also starts without PostgreSQL. Health is NOT_SERVING until it can be reached.

    Raises:
        ConfigurationError: a setting is wrong, or the address is in use.
    """
    await run_agreed(settings, stop, _serve, listen="stats_listen", ready=ready, reads_only=True)


async def _serve(run: AgreedRun) -> None:
    settings, stop = run.settings, run.stop
    async with AsyncExitStack() as stack:
        probes = await stack.enter_async_context(open_probes(settings))
        engine = create_engine(settings)
        stack.push_async_callback(engine.dispose)
        removing = create_engine(settings, lookups_only=True)
        stack.push_async_callback(removing.dispose)
        # The stored settings may change while this runs.
        watch = Watch(
            lambda senders: storage.read_watched(engine, run.settings.rate_window, senders)
        )
        servicer = StatsServicer(engine, lambda: Rules.from_settings(run.settings), watch)
        service = ServiceBinding(
            stats_service_pb2.DESCRIPTOR.services_by_name["StatsService"].full_name,
            partial(stats_service_pb2_grpc.add_StatsServiceServicer_to_server, servicer),
            dict.fromkeys(_COSTLY, FairShares("forecasts and audits", _AT_ONCE, waiting=_WAITING)),
        )
        process = await stack.enter_async_context(open_process(run, "stats", probes))
        metrics = StatsMetrics(
            process.monitoring.registry, partial(storage.read_gauges, engine), DATABASE_ERRORS
        )
        process.monitoring.before_scrape(metrics.refresh)

        async def fold() -> int:
            folded = await storage.fold_once(engine)
            metrics.folded.inc(folded)
            return folded

        work: list[Callable[[], Awaitable[None]]] = [
            partial(watch.run, stop),
            partial(fold_until_stopped, fold, stop, expected=DATABASE_ERRORS),
        ]
        if settings.retention is not None:
            work.append(partial(Purger(removing, settings.retention).run, stop))

        await process.serve([service], engine, loops=work)
