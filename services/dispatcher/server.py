"""Wires the dispatcher process together, and nothing else."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

from outbox.v1.dispatcher_service_pb2_grpc import add_DispatcherServiceServicer_to_server
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.dispatcher.composer import Composer
from outbox_server.services.dispatcher.dispatcher import Dispatcher
from outbox_server.services.dispatcher.endpoint_meter import EndpointMeter
from outbox_server.services.dispatcher.look_ahead import LookAhead
from outbox_server.services.dispatcher.metrics import DispatcherMetrics
from outbox_server.services.dispatcher.progress import Progress
from outbox_server.services.dispatcher.recovery import Recovery
from outbox_server.services.dispatcher.reporter import Reporter
from outbox_server.services.dispatcher.restore_guard import RestoreGuard
from outbox_server.services.dispatcher.servicers import DispatcherServicer
from outbox_server.services.dispatcher.smtp import SmtpPool
from outbox_server.services.dispatcher.storage import UpcomingBatch, find_upcoming_batches
from outbox_server.services.dispatcher.storage.endpoint_reports import EndpointReport
from outbox_server.services.dispatcher.storage.reports import DispatcherReport
from outbox_server.services.dispatcher.wake import WakeListener
from outbox_server.services.serving import open_process
from outbox_server.shared.agreed.run import UNKNOWN_KEY_SPACE, AgreedRun, run_agreed
from outbox_server.shared.agreed.values import AgreedSettings
from outbox_server.shared.database.engine import DATABASE_ERRORS, create_engine
from outbox_server.shared.database.frequent import KeptConnections
from outbox_server.shared.database.message_ids import installation_id
from outbox_server.shared.egress import Egress
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.loops import Loop, run_until_stopped
from outbox_server.shared.mail.content import BatchContent, read_batches_by
from outbox_server.shared.metrics.ready_jobs import ReadyJobsCollector
from outbox_server.shared.oauth2.token_client import TokenClient
from outbox_server.shared.oauth2.token_source import TokenSource
from outbox_server.shared.queue.circuits import CircuitChange, log_change
from outbox_server.shared.queue.connection import QUEUE_ERRORS, client_of, connect, open_queues
from outbox_server.shared.queue.following import FollowingClient, departures_of
from outbox_server.shared.queue.heartbeats import HeartbeatMemory
from outbox_server.shared.queue.old_keys import OldKeys
from outbox_server.shared.queue.serving import check_serving
from outbox_server.shared.rpc.probes import open_probes
from outbox_server.shared.rpc.server import ServiceBinding
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.settings import Settings
from outbox_server.shared.smtp.helo import helo_name
from outbox_server.shared.smtp.limits import PhaseLimits
from outbox_server.shared.smtp.replies import ReplyRules
from outbox_server.shared.templates.workers import WorkerPool
from outbox_server.shared.tls import TlsContexts

# The longest wait of a statement for a lock: it works for many jobs, and one row may be locked.
_LOCK_TIMEOUT: Final = timedelta(seconds=1)


async def serve(
    settings: Settings, stop: asyncio.Event, *, ready: Callable[[int], None] | None = None
) -> None:
    """Run a dispatcher until `stop` is set. `ready` is called with the port once it is bound."""
    await run_agreed(settings, stop, _serve, listen="dispatcher_listen", ready=ready)


async def _serve(run: AgreedRun) -> None:
    settings, stop = run.settings, run.stop
    async with AsyncExitStack() as stack:
        probes = await stack.enter_async_context(open_probes(settings))
        engine = create_engine(settings, lookups_only=True, lock_timeout=_LOCK_TIMEOUT)
        stack.push_async_callback(engine.dispose)
        statements = create_engine(
            settings,
            lookups_only=True,
            single_statements=True,
            lock_timeout=_LOCK_TIMEOUT,
            # One for marks, one for settlements, and one for the reads of batches.
            kept=3,
        )
        stack.push_async_callback(statements.dispose)
        redis, listening = connect(settings), connect(settings, listening=True)
        stack.push_async_callback(redis.aclose)
        stack.push_async_callback(listening.aclose)

        process = await stack.enter_async_context(open_process(run, "dispatcher", probes))
        monitoring = process.monitoring
        metrics = DispatcherMetrics(monitoring.registry)
        queues = open_queues(redis, settings, partial(_circuit_changed, metrics), run.key_space)
        loader = HeadLoader(engine, queues, settings, on_rebuild=metrics.rebuilt)
        monitoring.before_scrape(ReadyJobsCollector(monitoring.registry, queues).refresh)
        listeners = [
            WakeListener(
                client_of(listening, queue.keys.ready),
                queue.keys.wake,
                partial(departures_of, queue.redis),
            )
            for queue in queues
        ]
        box = SecretBox.from_settings(settings)
        egress = Egress.from_settings(settings)
        stack.push_async_callback(egress.close)
        tokens = TokenSource(statements, box, TokenClient.from_settings(settings, egress))
        stack.push_async_callback(tokens.close)
        pool = SmtpPool(
            limits=PhaseLimits.from_settings(settings),
            rules=ReplyRules.load(settings.reply_rules),
            size=settings.smtp_pool,
            idle=settings.smtp_idle.total_seconds(),
            mails_per_connection=settings.smtp_mails_per_connection,
            connection_age=settings.smtp_connection_age.total_seconds(),
            helo=helo_name(settings),
            egress=egress,
            tls=TlsContexts.from_settings(settings),
            tokens=tokens,
        )
        workers = WorkerPool(
            "outbox_server.shared.mail.worker",
            settings,
            monitoring.registry,
            # A mail waits for at most half of its lease, and takes at most three budgets.
            budget=min(settings.template_budget, settings.lease / 8),
        )
        stack.push_async_callback(workers.close)
        reads = KeptConnections(statements)
        stack.push_async_callback(reads.aclose)
        composer = Composer(
            settings,
            box,
            partial(_read_batches, reads),
            partial(_read_installation_id, engine),
            workers,
        )
        progress = Progress()
        meter = EndpointMeter()
        guard = RestoreGuard(
            engine,
            partial(HeartbeatMemory, redis),
            settings.hold_after,
            metrics,
            on_step_back=loader.hurry_patrol,
        )
        dispatcher = Dispatcher(
            settings=settings,
            statements=statements,
            transactions=engine,
            loader=loader,
            queues=queues,
            listeners=listeners,
            composer=composer,
            pool=pool,
            progress=progress,
            metrics=metrics,
            guard=guard,
            tracer=process.tracer,
            confirmed_at=lambda: run.confirmed_at,
            number=lambda: reporter.number,
            meter=meter,
        )
        run.follow(partial(_follow, run, dispatcher, partial(_later_loader, engine, redis)))
        dispatcher_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        reporter = Reporter(
            engine,
            lambda: _describe(dispatcher_id, settings.dispatcher_concurrency, dispatcher, progress),
            lambda: _endpoints(meter, servicer),
        )
        stack.push_async_callback(reporter.close)
        servicer = DispatcherServicer(
            engine=engine,
            dispatcher_id=dispatcher_id,
            concurrency=settings.dispatcher_concurrency,
            dispatcher=dispatcher,
            pool=pool,
            progress=progress,
            queues=queues,
            held_since=lambda: guard.held_since,
            on_drain=process.begin_drain,
        )
        service = ServiceBinding(
            "outbox.v1.DispatcherService",
            partial(add_DispatcherServiceServicer_to_server, servicer),
        )
        recovery = Recovery(settings, engine, loader, metrics)
        monitoring.before_scrape(partial(_show_circuits, servicer, metrics))
        quotas = Loop("quotas", dispatcher.read_quotas, errors=DATABASE_ERRORS)
        old_keys = OldKeys(
            redis,
            (UNKNOWN_KEY_SPACE, *run.agreed.old_key_spaces) if run.agreed else (),
            settings.shutdown_grace + settings.lease,
        )
        endless: list[Callable[[], Coroutine[Any, Any, None]]] = [
            *(listener.run for listener in listeners),
            guard.run,
            partial(guard.then, recovery.run, stop),
            quotas.run,
            Loop(
                "look ahead",
                LookAhead(queues, partial(_find_upcoming, reads), composer.prepare_ahead).step,
                errors=(*QUEUE_ERRORS, *DATABASE_ERRORS),
            ).run,
            reporter.run,
            # A search goes through all keys, so it is not repeated each second of an outage.
            Loop(
                "old keys",
                old_keys.delete_soon,
                errors=QUEUE_ERRORS,
                retry=timedelta(minutes=1),
            ).run,
        ]
        work: list[Callable[[], Awaitable[None]]] = [
            partial(guard.then, partial(_dispatch, run, dispatcher, statements), stop),
            *(partial(run_until_stopped, each, stop) for each in endless),
        ]

        await process.serve(
            [service],
            engine,
            statements=statements,
            loops=work,
            always=[
                partial(Loop("pool", partial(_close_idle, pool, settings.smtp_idle)).run, stop)
            ],
            check_redis=partial(_check_redis, loader),
        )


def _describe(
    dispatcher_id: str, concurrency: int, dispatcher: Dispatcher, progress: Progress
) -> DispatcherReport:
    attempts, sent = progress.rates()
    return DispatcherReport(
        dispatcher_id,
        concurrency,
        draining=dispatcher.draining,
        in_flight=dispatcher.in_flight,
        oldest_lease=dispatcher.oldest_lease,
        sent_per_second=sent,
        attempts_per_second=attempts,
    )


async def _endpoints(
    meter: EndpointMeter, servicer: DispatcherServicer
) -> Sequence[EndpointReport]:
    found = meter.figures()
    circuits = await servicer.open_circuits() if found else {}
    reports = []
    for name, figures in found.items():
        circuit = circuits.get(figures.circuit)
        reports.append(
            EndpointReport(
                name,
                figures.replies,
                figures.latencies,
                None if circuit is None else _time(circuit.open_since_ms),
                None if circuit is None else _time(circuit.next_probe_ms),
            )
        )
    return reports


def _time(unix_ms: int) -> datetime:
    return datetime.fromtimestamp(unix_ms / 1000, UTC)


async def _dispatch(run: AgreedRun, dispatcher: Dispatcher, engine: AsyncEngine) -> None:
    async with run.looking(engine):
        await dispatcher.run(run.stop)


def _follow(
    run: AgreedRun,
    dispatcher: Dispatcher,
    loader_of: Callable[[Settings, AgreedSettings], HeadLoader],
    settings: Settings,
    agreed: AgreedSettings,
) -> None:
    """Tell the next key space about the sends in flight, if the change has begun another one."""
    if agreed.key_space != run.key_space:
        dispatcher.follow(loader_of(settings, agreed))


def _later_loader(
    engine: AsyncEngine, redis: FollowingClient, settings: Settings, agreed: AgreedSettings
) -> HeadLoader:
    # The processes that claim from this key space report its circuits.
    queues = open_queues(redis, settings, lambda _: None, agreed.key_space)
    return HeadLoader(engine, queues, settings)


async def _read_batches(
    reads: KeptConnections, batch_ids: Sequence[int]
) -> dict[int, BatchContent]:
    async with reads.connection() as connection:
        return await read_batches_by(connection, batch_ids)


async def _find_upcoming(
    reads: KeptConnections, job_ids: Sequence[int]
) -> dict[int, UpcomingBatch]:
    async with reads.connection() as connection:
        return await find_upcoming_batches(connection, job_ids)


async def _read_installation_id(engine: AsyncEngine) -> str:
    async with engine.begin() as connection:
        return await installation_id(connection)


async def _check_redis(loader: HeadLoader) -> None:
    await check_serving(loader.queues)
    loader.lives.check()


def _circuit_changed(metrics: DispatcherMetrics, change: CircuitChange) -> None:
    metrics.circuit_changed(change)
    log_change(change)


async def _show_circuits(servicer: DispatcherServicer, metrics: DispatcherMetrics) -> None:
    metrics.open_circuits.set(len(await servicer.open_circuits()))


async def _close_idle(pool: SmtpPool, idle: timedelta) -> timedelta:
    pool.close_idle()
    return idle / 2
