"""A scheduler in this process, on a free port, and calls that tests make to it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import psycopg
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from outbox.v1 import (
    api_key_service_pb2_grpc,
    audit_service_pb2_grpc,
    batch_pb2,
    batch_service_pb2,
    batch_service_pb2_grpc,
    email_job_event_service_pb2_grpc,
    email_job_service_pb2_grpc,
    hold_service_pb2_grpc,
    sender_pb2,
    sender_service_pb2,
    sender_service_pb2_grpc,
    suppression_service_pb2_grpc,
    user_service_pb2_grpc,
    webhook_service_pb2_grpc,
)

from outbox_server.services.scheduler.server import serve
from outbox_server.shared.id_source import IdSource
from outbox_server.shared.settings import Settings, load_settings
from tests.dispatchers import DispatcherProcess, process
from tests.eventually import PATIENCE
from tests.kept_connection import KeptConnection
from tests.kept_status import keep_status
from tests.patience import be_patient

# Nothing listens there: the port is reserved for a service that no system runs any more.
NO_RELAY: Final = "smtp://127.0.0.1:1"
# How statements begin that lock rows, and no whole table.
_OF_ROWS: Final = ("DELETE ", "INSERT ", "SELECT ", "UPDATE ", "WITH ")

_request_ids = itertools.count(1)
keep_status()
be_patient()


@dataclass(frozen=True)
class Refusal:
    """The refusal of a call."""

    code: str
    reason: str
    message: str
    metadata: Mapping[str, str]
    # Descriptions of violations by field path.
    violations: Mapping[str, str] = field(default_factory=dict)


async def refusal_of(call: Awaitable[Any]) -> Refusal:
    """Return the refusal of `call`; fail if it is accepted."""
    with pytest.raises(grpc.RpcError) as caught:
        async with asyncio.timeout(PATIENCE):
            await call
    status = rpc_status.from_call(caught.value)
    assert status is not None, f"no details: {caught.value}"
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    violations: dict[str, str] = {}
    for detail in status.details:
        request = error_details_pb2.BadRequest()
        if detail.Unpack(request):
            violations = {each.field: each.description for each in request.field_violations}
    code = caught.value.code().name
    return Refusal(code, info.reason, status.message, dict(info.metadata), violations)


def reasons_of(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    """Return the code and the reason of a refusal; fail if it has no RetryInfo."""
    status = rpc_status.from_call(error)
    assert status is not None, f"no details: {error}"
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert any(detail.Unpack(retry) for detail in status.details), error
    assert retry.retry_delay.ToMilliseconds() > 0
    return error.code().name, info.reason


class Scheduler:
    """Stubs of all services, and access to their tables."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        settings: Settings,
        address: str,
        stop: Callable[[], None] = lambda: None,
        database: KeptConnection | None = None,
    ) -> None:
        """`stop` begins to stop the scheduler; `running_scheduler` waits for its end.

        Without `database`, each access to the tables opens a connection.
        """
        self.settings = settings
        self.address = address
        self.stop = stop
        self._database = database
        self.senders = sender_service_pb2_grpc.SenderServiceStub(channel)
        self.batches = batch_service_pb2_grpc.BatchServiceStub(channel)
        self.jobs = email_job_service_pb2_grpc.EmailJobServiceStub(channel)
        self.events = email_job_event_service_pb2_grpc.EmailJobEventServiceStub(channel)
        self.suppressions = suppression_service_pb2_grpc.SuppressionServiceStub(channel)
        self.webhooks = webhook_service_pb2_grpc.WebhookServiceStub(channel)
        self.users = user_service_pb2_grpc.UserServiceStub(channel)
        self.holds = hold_service_pb2_grpc.HoldServiceStub(channel)
        self.api_keys = api_key_service_pb2_grpc.ApiKeyServiceStub(channel)
        self.audit = audit_service_pb2_grpc.AuditServiceStub(channel)

    async def sender(self, user_id: str = "ann", **fields: Any) -> sender_pb2.Sender:
        """Create a sender."""
        fields = {"email": "news@example.com", **fields}
        request = sender_service_pb2.CreateSenderRequest(
            user_id=user_id, sender=sender_pb2.Sender(**fields)
        )
        return await self.senders.CreateSender(request)

    async def schedule(
        self,
        sender: sender_pb2.Sender,
        csv: str | bytes = "email\na@b.org\n",
        **options: Any,
    ) -> batch_service_pb2.ScheduleBatchResponse:
        """Schedule a CSV for a sender."""
        return await self.batches.ScheduleBatch(
            batch_service_pb2.ScheduleBatchRequest(
                options=options_for(sender, **options),
                csv=csv.encode() if isinstance(csv, str) else csv,
            ),
            timeout=PATIENCE,
        )

    def rows(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Query PostgreSQL directly."""
        with self._connect() as connection:
            return connection.execute(statement.encode(), parameters).fetchall()

    def execute(self, statement: str, *parameters: Any) -> None:
        """Change data in PostgreSQL directly."""
        assert statement.lstrip().startswith(_OF_ROWS), "use `define`"
        with self._connect() as connection:
            connection.execute(statement.encode(), parameters)

    def end_jobs(self, state: int, which: str = "true", *parameters: Any) -> None:
        """Move the open jobs for which an SQL condition is true to a state, and count them."""
        self.execute(
            "WITH moved AS (UPDATE email_jobs SET state = %s, attempt = 1, finished_at = now(),"
            f" lease_until = NULL WHERE state IN (1, 2) AND ({which})"
            " RETURNING sender_id, batch_id)"
            " INSERT INTO count_deltas (sender_id, batch_id, hour, state, n)"
            " SELECT sender_id, batch_id, date_trunc('hour', now()), s,"
            " CASE s WHEN 1 THEN -count(*) ELSE count(*) END"
            " FROM moved, unnest(ARRAY[1, %s]) AS s GROUP BY 1, 2, s",
            *(int(state), *parameters, int(state)),
        )

    def refuse_jobs(self, reply: str, which: str, *parameters: Any) -> None:
        """Store an attempt that was refused with 550 for jobs that `end_jobs` has ended."""
        self.execute(
            "INSERT INTO attempts (email_job_id, attempt, sender_id, started_at, ended_at,"
            " outcome, counted, smtp_code, message)"
            " SELECT id, 1, sender_id, now(), now(), 3, true, 550, %s FROM email_jobs"
            f" WHERE {which}",
            *(reply, *parameters),
        )

    async def define(self, statement: str) -> None:
        """Change the schema directly.

        It waits for a lock on a whole table, and the server of this process may have to end a
        transaction first: so it runs in a thread.
        """

        def run() -> None:
            with psycopg.connect(self.settings.database_url, autocommit=True) as connection:
                connection.execute(statement.encode())

        await asyncio.to_thread(run)

    def close(self) -> None:
        """Close the connection to the tables. Each later access opens one."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _connect(self) -> AbstractContextManager[KeptConnection]:
        if self._database is not None:
            return nullcontext(self._database)
        return closing(KeptConnection(self.settings.database_url))

    def value(self, statement: str, *parameters: Any) -> Any:
        """Return the one value of PostgreSQL's answer."""
        ((value,),) = self.rows(statement, *parameters)
        return value


def options_for(sender: sender_pb2.Sender, **options: Any) -> batch_pb2.BatchOptions:
    """Return valid options with the test's changes."""
    options = {
        "request_id": f"request-{next(_request_ids)}",
        "sender_id": sender.sender_id,
        "subject": "Hello",
        "body": "Good day",
        **options,
    }
    return batch_pb2.BatchOptions(
        **{name: value for name, value in options.items() if value is not None}
    )


def stored(sender: sender_pb2.Sender) -> sender_pb2.Sender:
    """Return a sender of GetSender as the other methods return it, without the present limits."""
    assert sender.HasField("effective_limits")
    sender.ClearField("effective_limits")
    return sender


@asynccontextmanager
async def running_scheduler(
    database_url: str, redis_url: str, ids: IdSource | None = None, /, **settings: Any
) -> AsyncIterator[Scheduler]:
    """Run a scheduler; `settings` are added to the usual ones."""
    loaded = load_settings(
        database_url=database_url,
        redis_url=redis_url,
        **{
            "scheduler_listen": "127.0.0.1:0",
            "auth": "off",
            "shutdown_grace": "5s",
            # Not the default: an inbox of another test may have that port.
            "smtp_url": NO_RELAY,
            **settings,
        },
    )
    stop = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(serve(loaded, stop, ready=port.set_result, ids=ids))
    waited: list[asyncio.Future[Any]] = [server, port]
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    if server.done():
        await server
    try:
        address = f"127.0.0.1:{await port}"
        async with grpc.aio.insecure_channel(address) as channel:
            database = KeptConnection(loaded.database_url)
            scheduler = Scheduler(channel, loaded, address, stop.set, database)
            with closing(scheduler):
                yield scheduler
    finally:
        stop.set()
        await server


@asynccontextmanager
async def scheduler_process(
    database_url: str, redis_url: str, folder: Path, address: str | None = None
) -> AsyncIterator[tuple[DispatcherProcess, str]]:
    """Run a scheduler as a separate process, which can be killed and paused; yield its address."""
    values = {
        "database_url": database_url,
        "redis_url": redis_url,
        "scheduler_listen": address or "127.0.0.1:0",
        "auth": "off",
        "log_level": "warning",
    }
    async with process(values, folder / "scheduler.log", "scheduler") as scheduler:
        yield scheduler, await scheduler.address()
