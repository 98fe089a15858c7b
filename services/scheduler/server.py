"""Wires the scheduler process together, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Final

from outbox.v1.api_key_service_pb2_grpc import add_ApiKeyServiceServicer_to_server
from outbox.v1.audit_service_pb2_grpc import add_AuditServiceServicer_to_server
from outbox.v1.batch_service_pb2_grpc import add_BatchServiceServicer_to_server
from outbox.v1.email_job_event_service_pb2_grpc import (
    add_EmailJobEventServiceServicer_to_server,
)
from outbox.v1.email_job_service_pb2_grpc import add_EmailJobServiceServicer_to_server
from outbox.v1.hold_service_pb2_grpc import add_HoldServiceServicer_to_server
from outbox.v1.sender_service_pb2_grpc import add_SenderServiceServicer_to_server
from outbox.v1.suppression_service_pb2_grpc import add_SuppressionServiceServicer_to_server
from outbox.v1.user_service_pb2_grpc import add_UserServiceServicer_to_server
from outbox.v1.webhook_service_pb2_grpc import add_WebhookServiceServicer_to_server
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox_server.services.scheduler.changes import Changes
from outbox_server.services.scheduler.explainer import Explainer
from outbox_server.services.scheduler.forecasts import Forecaster, QuickForecaster
from outbox_server.services.scheduler.forgetting import Forgetter
from outbox_server.services.scheduler.group_commit import GroupCommit
from outbox_server.services.scheduler.intake import Intake
from outbox_server.services.scheduler.job_sets import JobSets
from outbox_server.services.scheduler.metrics import SchedulerMetrics, WebhookMetrics
from outbox_server.services.scheduler.previewing import Previewer
from outbox_server.services.scheduler.respreading import Respreader
from outbox_server.services.scheduler.servicers.api_keys import ApiKeyServicer
from outbox_server.services.scheduler.servicers.audit import AuditServicer
from outbox_server.services.scheduler.servicers.batch_acceptance import BatchAcceptance
from outbox_server.services.scheduler.servicers.batch_control import BatchControl
from outbox_server.services.scheduler.servicers.batches import BatchServicer
from outbox_server.services.scheduler.servicers.email_job_events import EmailJobEventServicer
from outbox_server.services.scheduler.servicers.email_jobs import EmailJobServicer
from outbox_server.services.scheduler.servicers.exporting import JobExporter
from outbox_server.services.scheduler.servicers.holds import HoldServicer
from outbox_server.services.scheduler.servicers.job_cancelling import JobCanceller
from outbox_server.services.scheduler.servicers.senders import SenderServicer
from outbox_server.services.scheduler.servicers.suppressions import SuppressionServicer
from outbox_server.services.scheduler.servicers.users import UserServicer
from outbox_server.services.scheduler.servicers.webhooks import WebhookServicer
from outbox_server.services.scheduler.storage.access import in_transaction
from outbox_server.services.scheduler.storage.batches import BatchRecord, read_watched
from outbox_server.services.scheduler.storage.checking import CheckStore
from outbox_server.services.scheduler.storage.group_intake import GroupIntakeStore
from outbox_server.services.scheduler.storage.intake import IntakeStore
from outbox_server.services.scheduler.suppression_imports import ImportReader
from outbox_server.services.scheduler.sweeping import Sweeper
from outbox_server.services.scheduler.template_changes import TemplateChanges
from outbox_server.services.scheduler.verifying import Verifier
from outbox_server.services.scheduler.webhook_delivery import WebhookDelivery
from outbox_server.services.scheduler.webhook_posts import WebhookPoster
from outbox_server.services.serving import open_process
from outbox_server.shared.agreed.run import AgreedRun, run_agreed
from outbox_server.shared.database.engine import create_engine, snapshot
from outbox_server.shared.database.message_ids import installation_id
from outbox_server.shared.egress import Egress
from outbox_server.shared.events.watching import EventWatch
from outbox_server.shared.fair_shares import FairShares
from outbox_server.shared.forecast.pace import Rules
from outbox_server.shared.heads.coalescing import ShardLoads
from outbox_server.shared.heads.loader import HeadLoader
from outbox_server.shared.id_source import IdSource
from outbox_server.shared.intake.upload_rate import LeastRate
from outbox_server.shared.metrics.ready_jobs import ReadyJobsCollector
from outbox_server.shared.oauth2.token_client import TokenClient
from outbox_server.shared.oauth2.token_source import TokenSource
from outbox_server.shared.queue.connection import connect, open_queues
from outbox_server.shared.queue.serving import check_serving
from outbox_server.shared.queue.user_limits import UserSendLimits
from outbox_server.shared.reading_turns import ReadingTurns
from outbox_server.shared.rpc.probes import open_probes
from outbox_server.shared.rpc.server import ServiceBinding
from outbox_server.shared.rpc.watching import Watch
from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.settings import Settings
from outbox_server.shared.templates.remote import TemplateParser
from outbox_server.shared.user_quotas import UserQuotas

# How many pages of exports are read at once, in about 10 ms each, and how many wait. A user reads
# one at a time: more would be no faster, because the event loop builds them one by one.
_EXPORT_READS: Final = 4
_WAITING_EXPORTS: Final = 500
# How many erasures run at once, each of which compares all rejections of its user, and how many
# wait.
_ERASURES: Final = 4
_WAITING_ERASURES: Final = 100


async def serve(
    settings: Settings,
    stop: asyncio.Event,
    *,
    ready: Callable[[int], None] | None = None,
    ids: IdSource | None = None,
) -> None:
    """Serve until `stop` is set. `ready` is called with the port once it is bound.

    New senders, batches and jobs get their ids from `ids`; None means a new source.

    The process also starts without PostgreSQL and Redis. Health is NOT_SERVING until PostgreSQL can
    be reached. Without Redis, batches are accepted and sent later.

    Raises:
        ConfigurationError: a setting is wrong, or the address is in use.
    """
    serving = partial(_serve, ids=ids or IdSource())
    await run_agreed(settings, stop, serving, listen="scheduler_listen", ready=ready)


async def _serve(run: AgreedRun, *, ids: IdSource) -> None:
    settings, stop = run.settings, run.stop
    async with AsyncExitStack() as stack:
        probes = await stack.enter_async_context(open_probes(settings))
        engine = create_engine(settings, lookups_only=True)
        stack.push_async_callback(engine.dispose)
        # The writers of small batches keep two connections, so do the rounds of quick forecasts,
        # and the deletion of markers keeps one.
        statements = create_engine(settings, lookups_only=True, single_statements=True, kept=5)
        stack.push_async_callback(statements.dispose)
        redis = connect(settings)
        stack.push_async_callback(redis.aclose)
        process = await stack.enter_async_context(open_process(run, "scheduler", probes))
        monitoring, tracer = process.monitoring, process.tracer
        queues = open_queues(redis, settings, key_space=run.key_space)
        loader = HeadLoader(engine, queues, settings)
        # The scheduler shows this too, so that it can be seen when no dispatcher runs.
        monitoring.before_scrape(ReadyJobsCollector(monitoring.registry, queues).refresh)
        templates = TemplateParser(settings, monitoring.registry)
        stack.push_async_callback(templates.close)
        loads = ShardLoads(loader, statements)
        stack.push_async_callback(loads.close)
        forecaster = QuickForecaster(statements, Rules.from_settings(settings))
        stack.push_async_callback(forecaster.close)
        turns = ReadingTurns()
        intake = _intake(
            settings,
            engine,
            loads,
            forecaster,
            templates,
            turns=turns,
            statements=statements,
            ids=ids,
            metrics=SchedulerMetrics(monitoring.registry),
            trace_parent=None if tracer is None else tracer.current_parent,
        )
        stack.push_async_callback(intake.close)
        previewer = Previewer(
            engine,
            CheckStore(engine, UserQuotas.from_settings(settings), ids),
            templates,
            partial(in_transaction, engine, installation_id),
            turns=turns,
            max_message_bytes=settings.max_message_bytes,
            restrict_domains=settings.sender_policy == "domains",
            special_domains=settings.special_domains == "allow",
        )
        stack.callback(previewer.close)
        secrets = SecretBox.from_settings(settings)
        egress = Egress.from_settings(settings)
        stack.push_async_callback(egress.close)
        tokens = TokenSource(engine, secrets, TokenClient.from_settings(settings, egress))
        stack.push_async_callback(tokens.close)
        sweeper = Sweeper(engine)
        respreader = Respreader(engine, loader)
        sets = JobSets(
            engine, loader, UserQuotas.from_settings(settings), wake_sweeper=sweeper.wake
        )
        verifier = Verifier(settings, secrets, tokens, egress)
        changes = Changes(engine, secrets)
        control = BatchControl(
            engine,
            loader,
            changes,
            TemplateChanges(engine, templates, max_message_bytes=settings.max_message_bytes),
            respreader,
        )
        senders = SenderServicer(
            engine,
            loader,
            secrets,
            settings,
            verifier,
            changes=changes,
            wake_sweeper=sweeper.wake,
            ids=ids,
        )
        imports = ImportReader(turns)
        stack.callback(imports.close)
        watch = Watch(partial(_read_batches, engine))
        events = EventWatch(engine, settings.event_retention)
        poster = WebhookPoster.from_settings(settings)
        stack.push_async_callback(poster.close)
        delivery = WebhookDelivery(
            engine,
            secrets,
            poster,
            settings.webhook_backoff,
            ids=ids,
            metrics=WebhookMetrics(monitoring.registry),
        )
        webhooks = WebhookServicer(
            engine,
            secrets,
            poster,
            changes,
            quotas=UserQuotas.from_settings(settings),
            ids=ids,
            wake=delivery.wake,
        )
        services = [
            *_services(
                settings,
                engine,
                loader,
                intake,
                senders,
                changes=changes,
                sweeper=sweeper,
                sets=sets,
                canceller=_open_canceller(
                    stack, engine, changes, loads.load, previewer.installation_id
                ),
                watch=watch,
                imports=imports,
                previewer=previewer,
                control=control,
            ),
            ServiceBinding(
                "outbox.v1.EmailJobEventService",
                partial(
                    add_EmailJobEventServiceServicer_to_server,
                    EmailJobEventServicer(engine, events, settings),
                ),
            ),
            ServiceBinding(
                "outbox.v1.WebhookService",
                partial(add_WebhookServiceServicer_to_server, webhooks),
                {"TestWebhook": webhooks.shares},
            ),
        ]
        work: list[Callable[[], Awaitable[None]]] = [
            partial(sweeper.run, stop),
            partial(respreader.run, stop),
            partial(sets.run, stop),
            partial(watch.run, stop),
            partial(events.run, stop),
            partial(delivery.run, stop),
            partial(
                Forgetter(
                    engine,
                    settings.audit_retention,
                    event_retention=settings.event_retention,
                    most_job_events=settings.user_stored_events,
                ).run,
                stop,
            ),
        ]

        await process.serve(
            services,
            engine,
            loops=work,
            check_redis=partial(check_serving, queues),
            # Without Redis, batches are accepted. The dispatchers are not ready then.
            needs_redis=False,
        )


def _open_canceller(
    stack: AsyncExitStack,
    engine: AsyncEngine,
    changes: Changes,
    load: Callable[[int], Awaitable[bool]],
    read_installation_id: Callable[[], Awaitable[str]],
) -> JobCanceller:
    canceller = JobCanceller(engine, changes, load, read_installation_id)
    stack.push_async_callback(canceller.close)
    return canceller


def _intake(
    settings: Settings,
    engine: AsyncEngine,
    loads: ShardLoads,
    forecaster: QuickForecaster,
    templates: TemplateParser,
    *,
    turns: ReadingTurns,
    statements: AsyncEngine,
    ids: IdSource,
    metrics: SchedulerMetrics,
    trace_parent: Callable[[], str | None] | None,
) -> Intake:
    quotas = UserQuotas.from_settings(settings)
    restrict_domains = settings.sender_policy == "domains"
    return Intake(
        IntakeStore(engine, quotas, ids),
        GroupCommit(
            GroupIntakeStore(statements, quotas, ids),
            loads.add,
            restrict_domains=restrict_domains,
        ),
        loads.load,
        forecaster,
        templates,
        turns=turns,
        checks=CheckStore(engine, quotas, ids),
        max_message_bytes=settings.max_message_bytes,
        most_open=settings.database_pool * 2 // 3,
        restrict_domains=restrict_domains,
        special_domains=settings.special_domains == "allow",
        metrics=metrics,
        trace_parent=trace_parent,
    )


def _services(
    settings: Settings,
    engine: AsyncEngine,
    loader: HeadLoader,
    intake: Intake,
    senders: SenderServicer,
    *,
    changes: Changes,
    sweeper: Sweeper,
    sets: JobSets,
    canceller: JobCanceller,
    watch: Watch[BatchRecord],
    imports: ImportReader,
    previewer: Previewer,
    control: BatchControl,
) -> list[ServiceBinding]:
    rules = Rules.from_settings(settings)
    forecaster = Forecaster(rules)
    least_rate = LeastRate.from_settings(settings)
    batches = BatchServicer(
        engine,
        loader,
        forecaster,
        acceptance=BatchAcceptance(engine, intake, forecaster, previewer, least_rate),
        sweeper=sweeper,
        watch=watch,
        changes=changes,
        previewer=previewer,
        control=control,
    )
    explainer = Explainer(engine, loader, rules, settings.defer_for)
    quotas = UserQuotas.from_settings(settings)
    export_reads = FairShares(
        "exports", _EXPORT_READS, waiting=_WAITING_EXPORTS, reserve=_EXPORT_READS - 1
    )
    jobs = EmailJobServicer(
        engine,
        loader,
        explainer,
        quotas,
        changes=changes,
        sets=sets,
        canceller=canceller,
        exporter=JobExporter(engine, export_reads),
        previewer=previewer,
    )
    users = UserServicer(engine, loader, quotas, UserSendLimits.from_settings(settings), changes)
    suppressions = SuppressionServicer(
        engine,
        loader,
        changes,
        quotas=quotas,
        imports=imports,
        least_rate=least_rate,
        export_reads=export_reads,
    )
    holds = HoldServicer(engine, loader, changes)
    audit = AuditServicer(engine)
    keys = ApiKeyServicer(engine, changes)
    return [
        ServiceBinding(
            "outbox.v1.SenderService",
            partial(add_SenderServiceServicer_to_server, senders),
            {"VerifySender": senders.verifier.shares},
        ),
        ServiceBinding(
            "outbox.v1.BatchService",
            partial(add_BatchServiceServicer_to_server, batches),
            {
                "ScheduleBatch": intake.batches,
                "PreviewBatch": intake.batches,
                "SendTestEmail": intake.batches,
                "UploadBatch": intake.uploads,
                "UploadBatchFile": intake.uploads,
            },
        ),
        ServiceBinding(
            "outbox.v1.EmailJobService", partial(add_EmailJobServiceServicer_to_server, jobs)
        ),
        ServiceBinding(
            "outbox.v1.SuppressionService",
            partial(add_SuppressionServiceServicer_to_server, suppressions),
            {
                "ImportSuppressions": imports.shares,
                "ImportSuppressionsFile": imports.shares,
                "EraseRecipient": FairShares("erasures", _ERASURES, waiting=_WAITING_ERASURES),
            },
        ),
        ServiceBinding("outbox.v1.HoldService", partial(add_HoldServiceServicer_to_server, holds)),
        ServiceBinding("outbox.v1.UserService", partial(add_UserServiceServicer_to_server, users)),
        ServiceBinding(
            "outbox.v1.AuditService", partial(add_AuditServiceServicer_to_server, audit)
        ),
        ServiceBinding(
            "outbox.v1.ApiKeyService", partial(add_ApiKeyServiceServicer_to_server, keys)
        ),
    ]


async def _read_batches(
    engine: AsyncEngine, batch_ids: Collection[int]
) -> Mapping[int, BatchRecord]:
    async with snapshot(engine) as connection:
        return await read_watched(connection, batch_ids)
