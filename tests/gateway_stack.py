"""The three services with API keys, Envoy in front of them, and calls over HTTP."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from outbox_server.deploy.embedded.encryption_key import key_in
from outbox_server.deploy.embedded.gateway import EmbeddedGateway
from outbox_server.deploy.embedded.service import Service
from outbox_server.deploy.embedded.valkey import ValkeyServer
from outbox_server.deploy.ports import LOOPBACK, free_port
from outbox_server.shared.auth.keys import ApiKeyKind, make_key
from outbox_server.shared.auth.store import insert_key
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.settings import load_settings
from tests.eventually import PATIENCE
from tests.scheduler_stack import NO_RELAY

_KEYS: Final = {
    "operator": (ApiKeyKind.OPERATOR, None),
    "service": (ApiKeyKind.SERVICE, None),
    "ann": (ApiKeyKind.USER, "ann"),
    "bob": (ApiKeyKind.USER, "bob"),
}
_numbers = itertools.count(1)


@dataclass(frozen=True)
class HttpAnswer:
    """The answer to an HTTP call."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def document(self) -> Any:
        """The body as JSON."""
        assert self.headers.get("content-type") == "application/json", self
        return json.loads(self.body)

    @property
    def reason(self) -> str:
        """The reason of an error; all its parts are checked."""
        document = self.document
        assert set(document) == {"code", "message", "details"}, self
        assert document["message"]
        info = document["details"][0]
        assert info["@type"] == "type.googleapis.com/google.rpc.ErrorInfo"
        assert info["domain"] == "outbox"
        return str(info["reason"])


class GatewayStack:
    """Services, Valkey and Envoy, running from `start` to `stop`."""

    def __init__(self, folder: Path, database_url: str, runner: asyncio.Runner) -> None:
        self.folder = folder
        self.keys: dict[str, str] = {}
        self.runner = runner
        self._database_url = database_url
        self._valkey = ValkeyServer(folder / "valkey")
        self.services: dict[str, Service] = {}
        self.envoy: EmbeddedGateway | None = None

    @property
    def url(self) -> str:
        assert self.envoy is not None
        return self.envoy.url

    async def start(self) -> None:
        await asyncio.gather(self._valkey.start(), self._make_keys())
        environment = {
            "OUTBOX_DATABASE_URL": self._database_url,
            "OUTBOX_REDIS_URL": self._valkey.url,
            # The port has no listener, so VerifySender answers at once, and no mail is sent.
            "OUTBOX_SMTP_URL": NO_RELAY,
            "OUTBOX_SMTP_ALLOW": "127.0.0.0/8",
            "OUTBOX_SMTP_PORTS": "any",
            "OUTBOX_ENCRYPTION_KEYS": key_in(self.folder),
            "OUTBOX_AUTH": "keys",
        }
        self.services = {
            name: Service(
                name,
                name,
                f"{LOOPBACK}:{free_port()}",
                environment,
                folder=self.folder,
                log=self.folder / "logs" / f"{name}.log",
                grace=timedelta(seconds=5),
            )
            for name in ("scheduler", "stats", "dispatcher")
        }
        await asyncio.gather(*(service.start() for service in self.services.values()))
        self.envoy = EmbeddedGateway(
            self.folder / "gateway",
            {name: service.address for name, service in self.services.items()},
            port=None,
            log=self.folder / "logs" / "gateway.log",
        )
        await self.envoy.start()

    async def stop(self) -> None:
        if self.envoy is not None:
            await self.envoy.stop()
        await asyncio.gather(*(service.stop() for service in self.services.values()))
        await self._valkey.stop()

    def call(
        self, verb: str, path: str, body: Any = None, *, key: str | None = "service", **headers: str
    ) -> HttpAnswer:
        """Call the API. A body that is not bytes is sent as JSON."""
        with self.calling(verb, path, body, key=key, **headers) as answer:
            kept = {name.lower(): value for name, value in answer.getheaders()}
            try:
                body = answer.read()
            except http.client.IncompleteRead as cut:  # a stream that did not end properly
                body = cut.partial
            return HttpAnswer(answer.status, body, kept)

    @contextmanager
    def calling(
        self, verb: str, path: str, body: Any = None, *, key: str | None = "service", **headers: str
    ) -> Iterator[http.client.HTTPResponse]:
        """Call the API; yield the answer before its body is read."""
        connection = http.client.HTTPConnection(str(urlsplit(self.url).netloc), timeout=PATIENCE)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            sent["authorization"] = f"Bearer {self.keys[key]}"
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with closing(connection):
            connection.request(verb, path, data, sent)
            with closing(connection.getresponse()) as answer:
                yield answer

    def sender(self, key: str = "ann", **fields: Any) -> str:
        """Create a sender for the key's user; return its id."""
        fields = {"email": "news@example.com", **fields}
        answer = self.call("POST", "/api/senders", fields, key=key)
        assert answer.status == 200, answer
        return str(answer.document["sender_id"])

    def batch(self, sender_id: str, *emails: str, key: str = "ann", **options: Any) -> str:
        """Schedule mails for the future, unless `options` differ; return the batch's id."""
        given = {
            "request_id": f"request-{next(_numbers)}",
            "sender_id": sender_id,
            "subject": "Hello",
            "body": "Good day",
            "schedule_time": "2099-01-01T00:00:00Z",
            **options,
        }
        rows = [{"email": email} for email in emails or ("cy@example.com",)]
        answer = self.call(
            "POST",
            "/api/email-jobs/schedule",
            {"options": given, "recipients": {"rows": rows}},
            key=key,
        )
        assert answer.status == 200, answer
        return str(answer.document["batch"]["batch_id"])

    async def _make_keys(self) -> None:
        engine = create_engine(load_settings(database_url=self._database_url))
        async with engine.begin() as connection:
            for name, (kind, user_id) in _KEYS.items():
                new = make_key()
                await insert_key(connection, new, kind, user_id, name)
                self.keys[name] = new.text
        await engine.dispose()
