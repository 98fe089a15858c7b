"""An installation whose senders use OAuth 2.0: a scheduler, a provider, a mail server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from google.protobuf.field_mask_pb2 import FieldMask
from outbox.v1 import sender_pb2
from outbox.v1.sender_service_pb2 import (
    GetSenderRequest,
    ResumeSenderRequest,
    UpdateSenderRequest,
    VerifySenderRequest,
    VerifySenderResponse,
)

from outbox_server.deploy.certificates import self_signed, server_context
from outbox_server.shared.database.models import Base
from outbox_server.shared.secrets import generate_key
from tests.dispatchers import options, settings_of
from tests.oauth2_provider import OAuth2Provider
from tests.oauth2_smtp import OAuth2SmtpServer
from tests.scheduler_stack import Scheduler, running_scheduler
from tests.world import World

KEY: Final = generate_key()
MAILBOX: Final = "me@example.com"
REVOKED: Final = "OAuth 2.0: invalid_grant: Token has been expired or revoked."


@dataclass
class OAuth2Installation:
    """A scheduler, a provider and its mail server, and the settings to run dispatchers."""

    scheduler: Scheduler
    provider: OAuth2Provider
    server: OAuth2SmtpServer
    world: World
    values: dict[str, str]

    def endpoint(self, **oauth2: Any) -> sender_pb2.SmtpEndpoint:
        credentials = {
            "token_url": self.provider.url,
            "client_id": self.provider.client_id,
            "client_secret": self.provider.client_secret,
            "refresh_token": self.provider.refresh_token,
            **oauth2,
        }
        return sender_pb2.SmtpEndpoint(
            host="127.0.0.1",
            port=self.server.port,
            security=sender_pb2.SMTP_SECURITY_TLS,
            username=MAILBOX,
            oauth2=sender_pb2.OAuth2Credentials(**credentials),
        )

    async def sender(self, **oauth2: Any) -> sender_pb2.Sender:
        return await self.scheduler.sender(smtp=self.endpoint(**oauth2))

    async def verify(self, sender: sender_pb2.Sender) -> VerifySenderResponse:
        return await self.scheduler.senders.VerifySender(
            VerifySenderRequest(sender_id=sender.sender_id)
        )

    async def get(self, sender: sender_pb2.Sender) -> sender_pb2.Sender:
        return await self.scheduler.senders.GetSender(GetSenderRequest(sender_id=sender.sender_id))

    async def resume(self, sender: sender_pb2.Sender) -> sender_pb2.Sender:
        return await self.scheduler.senders.ResumeSender(
            ResumeSenderRequest(sender_id=sender.sender_id)
        )

    async def update(self, sender: sender_pb2.Sender, **fields: Any) -> sender_pb2.Sender:
        changed = sender_pb2.Sender(sender_id=sender.sender_id, **fields)
        return await self.scheduler.senders.UpdateSender(
            UpdateSenderRequest(sender=changed, update_mask=FieldMask(paths=list(fields)))
        )

    def dump(self) -> str:
        """Return all data of PostgreSQL as text."""
        found = []
        for table in Base.metadata.sorted_tables:
            found += self.scheduler.rows(f"SELECT t::text FROM {table.name} t")
        return str(found)


@asynccontextmanager
async def installed(
    database_url: str, redis_url: str, directory: Path, *, apart: bool = False
) -> AsyncIterator[OAuth2Installation]:
    """Run an installation that trusts the provider and the mail server.

    With `apart`, the mail server has its own certificate, in `directory / "mail"`, and the
    installation does not trust it.
    """
    certificate = self_signed(directory)
    settings = {
        "smtp_allow": "127.0.0.0/8",
        "smtp_ports": "any",
        "smtp_ca": str(certificate.public),
        "encryption_keys": KEY,
    }
    values = options(database_url, redis_url, "smtp://127.0.0.1:9", **settings)
    tls = server_context(certificate)
    async with AsyncExitStack() as stack:
        provider = await stack.enter_async_context(OAuth2Provider(tls))
        server = await stack.enter_async_context(
            OAuth2SmtpServer(
                server_context(self_signed(directory / "mail")) if apart else tls,
                lambda name, token: name == MAILBOX and token in provider.access_tokens,
            )
        )
        scheduler = await stack.enter_async_context(
            running_scheduler(database_url, redis_url, min_gap="0", **settings)
        )
        world = await stack.enter_async_context(World(settings_of(values)))
        yield OAuth2Installation(scheduler, provider, server, world, values)
