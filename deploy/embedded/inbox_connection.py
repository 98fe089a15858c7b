"""One connection of the development inbox. A trouble can replace or delay its replies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import AnyStr, Final, Protocol

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from outbox_server.deploy.embedded.trouble import LONG_LINE, InboxTrouble, Way
from outbox_server.deploy.mail_store import HOSTNAME
from outbox_server.deploy.ports import LOOPBACK
from outbox_server.deploy.providers.policy import GivenReply, Policy, Visit
from outbox_server.shared.smtp.replies import Phase

# The phases of a trouble, as a provider's policy names them. The reply to a body is missing: the
# policy is asked about it before the mail is stored.
_POLICY_PHASES: Final = {
    "greeting": Phase.CONNECT,
    "ehlo": Phase.EHLO,
    "auth": Phase.AUTH,
    "mail": Phase.MAIL,
    "rcpt": Phase.RCPT,
    "data": Phase.DATA,
}


class ConnectedInbox(Protocol):
    """The part of an inbox that its connections use."""

    size_limit: int
    # Gives each connection its number.
    numbers: Iterator[int]
    connections: set[InboxConnection]
    # The MAIL FROM of every mail that was permanently refused.
    refused: list[str]

    @property
    def trouble(self) -> InboxTrouble | None:
        """The current trouble; None if there is none."""

    @property
    def policy(self) -> Policy | None:
        """The policy of a trouble that imitates a provider; None without such a trouble."""

    def note_refusal(self, trouble: InboxTrouble, envelope: Envelope | None) -> None:
        """Record a mail that a trouble refuses permanently."""


class InboxConnection(SMTP):
    """aiosmtpd's protocol, which records the time of MAIL FROM and registers with its inbox."""

    def __init__(self, inbox: ConnectedInbox) -> None:
        super().__init__(
            inbox,
            hostname=HOSTNAME,
            ident="Outbox development inbox",
            data_size_limit=inbox.size_limit,
            enable_SMTPUTF8=True,
            auth_require_tls=False,
            authenticator=_sign_in,
            loop=asyncio.get_running_loop(),
        )
        self._inbox = inbox
        # The state of this connection for a provider's policy.
        self.visit = Visit(next(inbox.numbers), LOOPBACK)
        self.mail_began_at = 0.0
        # The phase of the next reply. Empty means a reply that no trouble concerns.
        self.phase = "greeting"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register with the inbox."""
        self._inbox.connections.add(self)
        if self._policy is not None:
            self._policy.enter(self.visit)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        """Unregister from the inbox."""
        self._inbox.connections.discard(self)
        if self._policy is not None:
            self._policy.leave(self.visit)
        super().connection_lost(error)

    @property
    def _policy(self) -> Policy | None:
        return self._inbox.policy

    async def smtp_EHLO(self, arg: str) -> None:
        """Answer EHLO."""
        self.phase = "ehlo"
        self.visit.helo = arg or ""
        await super().smtp_EHLO(arg)
        self.phase = ""

    async def smtp_AUTH(self, arg: str) -> None:
        """Answer AUTH."""
        self.phase = "auth"
        await super().smtp_AUTH(arg)

    async def smtp_MAIL(self, arg: str | None) -> None:
        """Answer MAIL, and record its time."""
        self.mail_began_at = time.time()
        self.phase = "mail"
        await super().smtp_MAIL(arg)

    async def smtp_RCPT(self, arg: str | None) -> None:
        """Answer RCPT."""
        self.phase = "rcpt"
        await super().smtp_RCPT(arg)

    async def smtp_DATA(self, arg: str) -> None:
        """Answer DATA."""
        self.phase = "data"
        await super().smtp_DATA(arg)

    async def push(self, status: AnyStr) -> None:
        """Send a line of a reply, unless a trouble replaces it."""
        phase, trouble = self.phase, self._inbox.trouble
        # A reply to EHLO has several lines.
        self.phase = phase if phase == "ehlo" else ""
        if trouble is None:
            await super().push(status)
        elif trouble.way is Way.PIECES:
            await self._push_pieces(status)
        elif trouble.way is Way.PROVIDER:
            await self._push_as_provider(phase, status)
        elif phase == "data" and trouble.phase == "body":
            await super().push(status)
            await self._trouble(trouble, phase)
        elif phase and phase == trouble.phase:
            await self._trouble(trouble, phase)
        else:
            await super().push(status)

    async def _trouble(self, trouble: InboxTrouble, phase: str) -> None:
        match trouble.way:
            case Way.HANG:
                # Wait until either side closes the connection, which cancels this task.
                await asyncio.Event().wait()
            case Way.CLOSE:
                self.cut()
            case Way.LONG:
                await super().push(b"250 2.0.0 " + b"x" * LONG_LINE)
            case _:
                if phase != "reply":
                    self._inbox.note_refusal(trouble, self.envelope)
                await super().push(trouble.text)
                if trouble.text.startswith("421"):
                    self.cut()

    async def _push_as_provider(self, phase: str, status: AnyStr) -> None:
        """Send `status`, unless it is a success that the provider refuses."""
        yes = (status if isinstance(status, bytes) else status.encode()).startswith((b"2", b"3"))
        asked = _POLICY_PHASES.get(phase) if yes else None
        given = None if asked is None else self.refused_by(self._policy, asked)
        if given is None:
            await super().push(status)
            self.visit.begun += yes and phase == "mail"
            return
        # A refused command must not change the transaction.
        if phase == "mail":
            self._set_rset_state()  # type: ignore[no-untyped-call]
        elif phase == "rcpt" and self.envelope is not None:
            self.envelope.rcpt_tos.pop()
        await super().push(given.reply)
        if given.refusing.closes:
            self.cut()

    def refused_by(
        self, policy: Policy | None, phase: Phase, content: bytes = b""
    ) -> GivenReply | None:
        """Return the refusal of a provider's policy, if any. Permanent refusals are recorded."""
        if policy is None:
            return None
        envelope = self.envelope
        recipients = envelope.rcpt_tos if envelope is not None else []
        self.visit.mail_from = (envelope.mail_from if envelope is not None else None) or ""
        given = policy.refused(
            phase,
            self.visit,
            time.monotonic(),
            recipient=recipients[-1] if recipients else "",
            content=content,
        )
        if given is not None and given.refusing.for_good:
            self._inbox.refused.append(self.visit.mail_from)
        return given

    async def _push_pieces(self, status: AnyStr) -> None:
        text = status.encode() if isinstance(status, str) else status
        for byte in text + b"\r\n":
            self._writer.write(bytes((byte,)))
            await asyncio.sleep(0)  # one piece per iteration of the event loop

    def cut(self) -> None:
        """Close the connection without a reply, like a dying server."""
        if isinstance(self.transport, asyncio.Transport):
            self.transport.abort()


def _sign_in(
    server: SMTP, _session: Session, _envelope: Envelope, _mechanism: str, data: object
) -> AuthResult:
    """Accept every sign-in. A provider's limits count by its user name."""
    if isinstance(server, InboxConnection) and isinstance(data, LoginPassword):
        server.visit.account = data.login.decode("utf-8", "replace")
    return AuthResult(success=True)
