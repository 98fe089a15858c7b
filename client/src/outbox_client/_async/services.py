"""The stubs of all services, each on the one channel of its address."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import grpc
from outbox.v1.api_key_service_pb2_grpc import ApiKeyServiceStub
from outbox.v1.audit_service_pb2_grpc import AuditServiceStub
from outbox.v1.batch_service_pb2_grpc import BatchServiceStub
from outbox.v1.dispatcher_service_pb2_grpc import DispatcherServiceStub
from outbox.v1.email_job_event_service_pb2_grpc import EmailJobEventServiceStub
from outbox.v1.email_job_service_pb2_grpc import EmailJobServiceStub
from outbox.v1.hold_service_pb2_grpc import HoldServiceStub
from outbox.v1.sender_service_pb2_grpc import SenderServiceStub
from outbox.v1.server_service_pb2_grpc import ServerServiceStub
from outbox.v1.stats_service_pb2_grpc import StatsServiceStub
from outbox.v1.suppression_service_pb2_grpc import SuppressionServiceStub
from outbox.v1.user_service_pb2_grpc import UserServiceStub
from outbox.v1.webhook_service_pb2_grpc import WebhookServiceStub

from outbox_client._async.channel import Channel
from outbox_client.retries import RetryPolicy
from outbox_client.settings import Connection, Tls

if TYPE_CHECKING:  # names that only the type stubs know
    from outbox.v1.api_key_service_pb2_grpc import ApiKeyServiceAsyncStub
    from outbox.v1.audit_service_pb2_grpc import AuditServiceAsyncStub
    from outbox.v1.batch_service_pb2_grpc import BatchServiceAsyncStub
    from outbox.v1.dispatcher_service_pb2_grpc import DispatcherServiceAsyncStub
    from outbox.v1.email_job_event_service_pb2_grpc import EmailJobEventServiceAsyncStub
    from outbox.v1.email_job_service_pb2_grpc import EmailJobServiceAsyncStub
    from outbox.v1.hold_service_pb2_grpc import HoldServiceAsyncStub
    from outbox.v1.sender_service_pb2_grpc import SenderServiceAsyncStub
    from outbox.v1.server_service_pb2_grpc import ServerServiceAsyncStub
    from outbox.v1.stats_service_pb2_grpc import StatsServiceAsyncStub
    from outbox.v1.suppression_service_pb2_grpc import SuppressionServiceAsyncStub
    from outbox.v1.user_service_pb2_grpc import UserServiceAsyncStub
    from outbox.v1.webhook_service_pb2_grpc import WebhookServiceAsyncStub


class AsyncServices:
    """The connections to one Outbox installation, and the stubs of its services."""

    def __init__(
        self,
        scheduler: str | None = None,
        *,
        stats: str | None = None,
        dispatcher: str | None = None,
        api_key: str | None = None,
        tls: Tls | None = None,
        timeout: float | None = None,
        upload_timeout: float = 3600.0,
        retry: RetryPolicy | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Create a client without connecting: a channel opens when its service is first used.

        Args:
            scheduler: host:port of the scheduler, or of a proxy in front of it. A client without
                any address uses the default ports of this machine.
            stats: host:port of the stats service.
            dispatcher: host:port of a dispatcher.
            api_key: sent with every call; use TLS, unless you trust the network.
            tls: None means no TLS.
            timeout: limit of a call in seconds, for all its tries together. None means that of its
                method in the published service config: 30 s, or 300 s if it may change many rows.
            upload_timeout: limit of an upload in seconds.
            retry: None means 7 tries within 6.3 s.
            options: gRPC's channel options, which override those of this client.

        Raises:
            OSError, ValueError: the files of `tls` cannot be used.
        """
        if scheduler is None and stats is None and dispatcher is None:
            scheduler, dispatcher, stats = (f"127.0.0.1:{port}" for port in (50051, 50052, 50053))
        self._addresses = {"scheduler": scheduler, "stats": stats, "dispatcher": dispatcher}
        self._connection = Connection(
            api_key=api_key,
            credentials=None if tls is None else tls.credentials(),
            timeout=timeout,
            upload_timeout=upload_timeout,
            retry=retry or RetryPolicy(),
            options=options,
        )
        self._channels: dict[str, Channel] = {}
        self._stubs: dict[Any, Any] = {}

    @property
    def senders(self) -> SenderServiceAsyncStub:
        """SenderService."""
        return cast("SenderServiceAsyncStub", self._stub("scheduler", SenderServiceStub))

    @property
    def batches(self) -> BatchServiceAsyncStub:
        """BatchService. For UploadBatch, see `upload`."""
        return cast("BatchServiceAsyncStub", self._stub("scheduler", BatchServiceStub))

    @property
    def email_jobs(self) -> EmailJobServiceAsyncStub:
        """EmailJobService."""
        return cast("EmailJobServiceAsyncStub", self._stub("scheduler", EmailJobServiceStub))

    @property
    def email_job_events(self) -> EmailJobEventServiceAsyncStub:
        """EmailJobEventService."""
        return cast(
            "EmailJobEventServiceAsyncStub", self._stub("scheduler", EmailJobEventServiceStub)
        )

    @property
    def webhooks(self) -> WebhookServiceAsyncStub:
        """WebhookService."""
        return cast("WebhookServiceAsyncStub", self._stub("scheduler", WebhookServiceStub))

    @property
    def users(self) -> UserServiceAsyncStub:
        """UserService, for operators."""
        return cast("UserServiceAsyncStub", self._stub("scheduler", UserServiceStub))

    @property
    def api_keys(self) -> ApiKeyServiceAsyncStub:
        """ApiKeyService, for operators."""
        return cast("ApiKeyServiceAsyncStub", self._stub("scheduler", ApiKeyServiceStub))

    @property
    def audit(self) -> AuditServiceAsyncStub:
        """AuditService, for operators."""
        return cast("AuditServiceAsyncStub", self._stub("scheduler", AuditServiceStub))

    @property
    def holds(self) -> HoldServiceAsyncStub:
        """HoldService, for operators."""
        return cast("HoldServiceAsyncStub", self._stub("scheduler", HoldServiceStub))

    @property
    def suppressions(self) -> SuppressionServiceAsyncStub:
        """SuppressionService."""
        return cast("SuppressionServiceAsyncStub", self._stub("scheduler", SuppressionServiceStub))

    @property
    def stats(self) -> StatsServiceAsyncStub:
        """StatsService."""
        return cast("StatsServiceAsyncStub", self._stub("stats", StatsServiceStub))

    @property
    def dispatcher(self) -> DispatcherServiceAsyncStub:
        """DispatcherService, of one dispatcher."""
        return cast("DispatcherServiceAsyncStub", self._stub("dispatcher", DispatcherServiceStub))

    @property
    def server(self) -> ServerServiceAsyncStub:
        """ServerService of the first of these that has an address: scheduler, stats, dispatcher."""
        first = next(name for name, address in self._addresses.items() if address is not None)
        return cast("ServerServiceAsyncStub", self._stub(first, ServerServiceStub))

    async def close(self) -> None:
        """Close the channels, and cancel calls in progress."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
        self._stubs.clear()

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the client."""
        await self.close()

    def _stub(self, service: str, stub: Any) -> Any:
        """Return a stub, created at its first use, on the one channel of its address."""
        if stub not in self._stubs:
            address = self._addresses[service]
            if address is None:
                raise ValueError(f"{service} has no address; pass Client({service}='host:port')")
            if address not in self._channels:
                self._channels[address] = Channel(address, self._connection)
            self._stubs[stub] = stub(cast("grpc.aio.Channel", self._channels[address]))
        return self._stubs[stub]
