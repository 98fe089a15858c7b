"""ServerService, which every server serves: its version, schema revisions and capabilities."""

from __future__ import annotations

import importlib.metadata
from functools import partial
from typing import Any, Final

import grpc
from outbox.v1 import server_service_pb2 as pb
from outbox.v1 import server_service_pb2_grpc

from outbox_server.shared.database.schema import SchemaGuard
from outbox_server.shared.rpc.server import ServiceBinding

# A name is never removed and never changes its meaning; the proto says what each means.
CAPABILITIES: Final = (
    "api_keys",
    "attempt.dispatcher",
    "batch.headers",
    "batch.preview",
    "batch.request_id",
    "batch.test_email",
    "batch.watch_resume",
    "change.audit",
    "change.etag",
    "change.request_id",
    "change.validate_only",
    "hold",
    "job.explain_waits",
    "job.export",
    "job.labels",
    "job.watch",
    "sender.cooldown",
    "sender.oauth2",
    "sender.preset",
    "sender.sending_hours",
    "stats.endpoints",
    "stats.forecast_planned",
    "suppression.import",
    "user.quotas",
    "webhook",
)


def installed_version() -> str:
    """Return the version of the installed server."""
    return importlib.metadata.version("outbox")


class ServerServicer(server_service_pb2_grpc.ServerServiceServicer):
    """Answers from memory, so that it also works while PostgreSQL is away."""

    def __init__(self, service: str, schema: SchemaGuard) -> None:
        self._service = service
        self._schema = schema
        self._version = installed_version()

    async def GetServerInfo(
        self,
        request: pb.GetServerInfoRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.ServerInfo:
        """Return the description of this server."""
        return pb.ServerInfo(
            service=self._service,
            version=self._version,
            schema_revision=self._schema.revision,
            code_schema_revision=self._schema.code,
            capabilities=CAPABILITIES,
        )


def server_service(service: str, schema: SchemaGuard) -> ServiceBinding:
    """Return ServerService of the process `service`: `scheduler`, `dispatcher` or `stats`."""
    return ServiceBinding(
        pb.DESCRIPTOR.services_by_name["ServerService"].full_name,
        partial(
            server_service_pb2_grpc.add_ServerServiceServicer_to_server,
            ServerServicer(service, schema),
        ),
    )
