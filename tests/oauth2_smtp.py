"""A mail server over TLS that accepts access tokens: AUTH XOAUTH2 and OAUTHBEARER."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.stream_server import StreamServer

_BEARER: Final = re.compile(r"auth=Bearer ([^\x01]*)\x01")
_USER: Final = {
    "XOAUTH2": re.compile(r"user=([^\x01]*)\x01"),
    "OAUTHBEARER": re.compile(r"n,a=([^,]*),\x01"),
}


@dataclass(frozen=True)
class PresentedToken:
    """One AUTH: the presented token, and whether it was accepted."""

    mechanism: str
    username: str
    token: str
    accepted: bool
    connection: int


class OAuth2SmtpServer(StreamServer):
    """Accepts mail from clients with a token for which `accepts(username, token)` is true."""

    def __init__(
        self,
        tls: ssl.SSLContext,
        accepts: Callable[[str, str], bool],
        *,
        mechanisms: str = "PLAIN XOAUTH2 OAUTHBEARER",
        # Whether a refusal comes after a challenge, as at Google, or at once, as at Microsoft.
        challenges: bool = True,
        # Whether the reply to a refused token quotes it, as at some servers.
        quotes: bool = False,
    ) -> None:
        super().__init__(tls)
        self._accepts = accepts
        self.mechanisms = mechanisms
        self._challenges = challenges
        self._quotes = quotes
        self.presented: list[PresentedToken] = []
        # The clients' answers to challenges.
        self.dummies: list[str] = []
        self.mails: list[bytes] = []
        # The numbers of the connections that clients ended with QUIT.
        self.quits: list[int] = []

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _OAuth2SmtpSession(self, reader, writer, self.connections).run()


class _OAuth2SmtpSession:
    def __init__(
        self,
        server: OAuth2SmtpServer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        number: int,
    ) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self._number = number
        self._signed_in = False
        self._token = ""

    async def run(self) -> None:
        await self._say("220 oauth2.test ESMTP")
        while line := (await self._reader.readline()).decode().rstrip("\r\n"):
            verb = line.partition(" ")[0].upper()
            if verb == "EHLO":
                await self._say(f"250-oauth2.test\r\n250 AUTH {self._server.mechanisms}")
            elif verb == "AUTH":
                await self._auth(line)
            elif verb == "DATA":
                await self._say("354 go ahead")
                body = await self._reader.readuntil(b"\r\n.\r\n")
                self._server.mails.append(body)
                quoted = f" from {self._token}" if self._server._quotes else ""
                await self._say(f"250 2.0.0 taken{quoted}")
            elif verb == "QUIT":
                self._server.quits.append(self._number)
                await self._say("221 2.0.0 bye")
                return
            elif verb == "MAIL" and not self._signed_in:
                await self._say("530 5.7.57 Client not authenticated to send mail")
            else:
                await self._say("250 2.0.0 ok")

    async def _auth(self, line: str) -> None:
        _, mechanism, initial = line.split(" ")
        said = base64.b64decode(initial, validate=True).decode()
        token, user = _BEARER.search(said), _USER[mechanism].search(said)
        assert token, said
        assert user, said
        name = user[1].replace("=2C", ",").replace("=3D", "=")
        accepted = self._server._accepts(name, token[1])
        self._server.presented.append(
            PresentedToken(mechanism, name, token[1], accepted, self._number)
        )
        if accepted:
            self._signed_in, self._token = True, token[1]
            await self._say("235 2.7.0 Accepted")
            return
        if self._server._challenges:
            reason = json.dumps({"status": "401", "schemes": "bearer", "scope": "mail"})
            await self._say(f"334 {base64.b64encode(reason.encode()).decode()}")
            answer = await self._reader.readline()
            self._server.dummies.append(answer.decode().rstrip("\r\n"))
        quoted = f" not this one: {line[:200]} {said[-90:]}" if self._server._quotes else ""
        await self._say(
            f"535 5.7.8 Username and Password not accepted{quoted}".replace("\x01", "~")
        )

    async def _say(self, text: str) -> None:
        self._writer.write(text.encode() + b"\r\n")
        await self._writer.drain()
