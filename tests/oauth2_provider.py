"""A token endpoint over HTTPS that answers like Google or Microsoft, or as a test plans.

Both kinds of answers follow the providers' documentation and RFC 6749. The server counts the
requests, and knows which access tokens a mail server may accept.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qsl

from tests.stream_server import StreamServer

Style = Literal["google", "microsoft"]


@dataclass(frozen=True)
class PlannedAnswer:
    """Answer with this. With `cut`, close the connection after half of the body."""

    status: int
    document: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    cut: bool = False

    def content(self) -> bytes:
        return self.body if self.body is not None else json.dumps(self.document).encode()


@dataclass(frozen=True)
class Hold:
    """Answer as usual when the event is set."""

    event: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Endless:
    """Send a body that does not end."""


Step = PlannedAnswer | Hold | Endless


class OAuth2Provider(StreamServer):
    """One application and its mailboxes. Use as a context manager; `url` is the token URL."""

    def __init__(
        self,
        tls: ssl.SSLContext | None,
        *,
        style: Style = "google",
        client_id: str = "outbox-client",
        client_secret: str = "shh-client-secret-0001",
        lifetime: int = 3599,
    ) -> None:
        super().__init__(tls)
        self.style = style
        self.client_id = client_id
        self.client_secret = client_secret
        self.lifetime = lifetime
        # The answers to the next requests, one step each; afterwards the style decides.
        self.plan: list[Step] = []
        # The form of each request.
        self.requests: list[dict[str, str]] = []
        # The number of requests that wait for an answer now.
        self.held = 0
        # Valid refresh tokens, and the access tokens that a mail server may accept.
        self.refresh_tokens = {"1//refresh-token-of-the-mailbox-0000"}
        self.access_tokens: set[str] = set()
        self._numbers = itertools.count(1)

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/token"

    @property
    def refresh_token(self) -> str:
        """The newest refresh token."""
        return max(self.refresh_tokens)

    def secrets(self) -> list[str]:
        """Return all secrets that were ever used; none of them may appear in plain text."""
        given = [*self.refresh_tokens, *self.access_tokens, self.client_secret]
        return given + [form["refresh_token"] for form in self.requests if "refresh_token" in form]

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        assert head[0] == "POST /token HTTP/1.1", head[0]
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        form = dict(parse_qsl((await reader.readexactly(int(headers["content-length"]))).decode()))
        self.requests.append(form)
        step = self.plan.pop(0) if self.plan else None
        if isinstance(step, Hold):
            self.held += 1
            try:
                await step.event.wait()
            finally:
                self.held -= 1
        if isinstance(step, Endless):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
            while True:
                writer.write(b" " * 16_384)
                await writer.drain()
        answer = step if isinstance(step, PlannedAnswer) else self._answer(form)
        await _say(writer, answer)

    def _answer(self, form: Mapping[str, str]) -> PlannedAnswer:
        if form.get("client_id") != self.client_id or (
            form.get("client_secret", "") != self.client_secret
        ):
            return self._error("invalid_client")
        if form["grant_type"] == "client_credentials":
            return self._token()
        if form.get("refresh_token") not in self.refresh_tokens:
            return self._error("invalid_grant")
        return self._token(rotates=self.style == "microsoft")

    def _token(self, *, rotates: bool = False) -> PlannedAnswer:
        number = next(self._numbers)
        token = f"ya29.access-token-number-{number:04}-{'x' * 80}"
        self.access_tokens.add(token)
        document: dict[str, Any] = {
            "access_token": token,
            "expires_in": self.lifetime,
            "token_type": "Bearer",
        }
        if self.style == "google":
            document["scope"] = "https://mail.google.com/"
        if rotates:
            # The old refresh token stays valid, as at Microsoft.
            document["refresh_token"] = f"1//refresh-token-of-the-mailbox-{number:04}"
            self.refresh_tokens.add(document["refresh_token"])
        return PlannedAnswer(200, document)

    def _error(self, error: str) -> PlannedAnswer:
        if self.style == "google":
            texts = {
                "invalid_grant": (400, "Token has been expired or revoked."),
                "invalid_client": (401, "The OAuth client was not found."),
            }
            status, text = texts[error]
            return PlannedAnswer(status, {"error": error, "error_description": text})
        codes = {
            "invalid_grant": (400, 70008, "The refresh token has expired due to inactivity."),
            "invalid_client": (401, 7000215, "Invalid client secret provided."),
        }
        status, code, text = codes[error]
        described = (
            f"AADSTS{code}: {text}\r\nTrace ID: 0a1b\r\nCorrelation ID: 2c3d\r\n"
            "Timestamp: 2026-11-28 12:00:00Z"
        )
        return PlannedAnswer(
            status,
            {"error": error, "error_description": described, "error_codes": [code]},
        )


async def _say(writer: asyncio.StreamWriter, answer: PlannedAnswer) -> None:
    content = answer.content()
    lines = [f"HTTP/1.1 {answer.status} Said", f"Content-Length: {len(content)}"]
    lines += [f"{name}: {value}" for name, value in answer.headers.items()]
    writer.write("\r\n".join([*lines, "Content-Type: application/json", "", ""]).encode())
    writer.write(content[: len(content) // 2] if answer.cut else content)
    await writer.drain()
    if not answer.cut:
        # Close the sending half of TLS: the data that was written arrives before the end.
        writer.close()
        await writer.wait_closed()
