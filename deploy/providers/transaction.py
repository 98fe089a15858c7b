"""Receives the mails of one connection: MAIL, RCPT, DATA, body."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import Final

from outbox_server.deploy.mail_store import message_id_of
from outbox_server.deploy.providers.speaker import Speaker
from outbox_server.deploy.providers.tally import AcceptedMail
from outbox_server.deploy.providers.wire import LONGEST_TEXT_LINE, BodyTooLargeError
from outbox_server.shared.smtp.replies import Phase

_PATH: Final = re.compile(r"(FROM|TO):\s*<([^<>\s]*)>((?:\s+\S+)*)\s*", re.IGNORECASE)
# RFC 5321, 4.5.3.1.3, without the angle brackets.
_LONGEST_PATH: Final = 254
_SIZE: Final = re.compile(r"[0-9]{1,20}")
# Which extension a parameter of MAIL or RCPT belongs to.
_PARAMETERS: Final = {
    "BODY": "8BITMIME",
    "SMTPUTF8": "SMTPUTF8",
    "RET": "DSN",
    "ENVID": "DSN",
    "NOTIFY": "DSN",
    "ORCPT": "DSN",
}


@dataclass
class BegunMail:
    """A mail between MAIL and the final dot."""

    mail_from: str
    utf8: bool
    started_at: float
    recipients: list[str] = field(default_factory=list)


class MailTransaction:
    """Receives mails, one after the other. `extended` means that the client sent EHLO, not HELO."""

    def __init__(self, speaker: Speaker) -> None:
        self.extended = False
        self._speaker = speaker
        self._backend = speaker.backend
        self._visit = speaker.visit
        self._mail: BegunMail | None = None

    @property
    def begun(self) -> bool:
        """Whether a MAIL was accepted, and its mail has not ended."""
        return self._mail is not None

    def reset(self) -> None:
        """Discard the mail that has begun."""
        self._mail = None

    async def begin(self, argument: str) -> None:
        """Handle a MAIL command."""
        visit = self._visit
        if self._mail is not None:
            self._speaker.error(503, "5.5.1", "Error: nested MAIL command")
            return
        address, parameters = self._path(argument, "FROM")
        if address is None or not self._takes(parameters, address):
            return
        visit.mail_from = address
        if self._speaker.check(Phase.MAIL):
            visit.begun += 1
            self._mail = BegunMail(address, "SMTPUTF8" in parameters, time.time())
            self._speaker.say(250, "Ok", "2.1.0")

    async def recipient(self, argument: str) -> None:
        """Handle a RCPT command."""
        if self._mail is None:
            self._speaker.error(503, "5.5.1", "Error: need MAIL command")
            return
        address, parameters = self._path(argument, "TO")
        if address is None or not self._takes(parameters, address, utf8=self._mail.utf8):
            return
        if not address:
            self._speaker.error(501, "5.1.3", "Bad recipient address syntax")
        elif len(self._mail.recipients) >= self._backend.profile.recipients_per_mail:
            self._speaker.error(452, "4.5.3", "Error: too many recipients")
        elif self._speaker.check(Phase.RCPT, recipient=address):
            self._mail.recipients.append(address)
            self._speaker.say(250, "Ok", "2.1.5")

    def _path(self, argument: str, word: str) -> tuple[str | None, dict[str, str]]:
        found = _PATH.fullmatch(argument)
        if found is None or found[1].upper() != word or len(found[2]) > _LONGEST_PATH:
            self._speaker.error(501, "5.5.4", f"Syntax: {word}:<address>")
            return None, {}
        pairs = (one.partition("=") for one in found[3].split())
        return found[2], {name.upper(): value for name, _, value in pairs}

    def _takes(self, parameters: dict[str, str], address: str, *, utf8: bool | None = None) -> bool:
        """Return whether the parameters of MAIL or RCPT are valid. If they are not, reply so."""
        profile = self._backend.profile
        for name, value in parameters.items():
            known = name in ("SIZE", "AUTH") or _PARAMETERS.get(name) in profile.extensions
            if not (known and self.extended):
                self._speaker.error(555, "5.5.4", f"Unsupported option: {name}")
                return False
            # RFC 1870: at most 20 digits.
            if name == "SIZE" and not _SIZE.fullmatch(value):
                self._speaker.error(501, "5.5.4", "Syntax: SIZE=number")
                return False
            if name == "SIZE" and int(value) > profile.size:
                self._too_large()
                return False
        if not address.isascii() and not ("SMTPUTF8" in parameters if utf8 is None else utf8):
            self._speaker.error(553, "5.6.7", "The address needs SMTPUTF8")
            return False
        return True

    async def data(self, argument: str) -> None:
        """Handle a DATA command, and receive the body after it."""
        profile, mail = self._backend.profile, self._mail
        if argument:
            self._speaker.error(501, "5.5.4", "Syntax: DATA")
        elif mail is None:
            self._speaker.error(503, "5.5.1", "Error: need RCPT command")
        elif not mail.recipients and not profile.data_without_recipients:
            self._speaker.error(554, "5.5.1", "Error: no valid recipients")
        elif self._speaker.check(Phase.DATA):
            self._speaker.say(354, "End data with <CR><LF>.<CR><LF>")
            await self._body(mail)

    async def _body(self, mail: BegunMail) -> None:
        profile = self._backend.profile
        self._mail = None
        try:
            content = await self._speaker.wire.read_body(profile.size)
        except BodyTooLargeError:
            self._too_large()
            return
        if not mail.recipients:
            self._speaker.error(554, "5.5.1", "Error: no valid recipients")
        elif any(len(line) > LONGEST_TEXT_LINE for line in content.split(b"\r\n")):
            self._speaker.error(500, "5.5.2", "Error: a line of the mail is too long")
        elif self._speaker.check(Phase.BODY, recipient=mail.recipients[0], content=content):
            # Accepted from here on, whether the client waits for the reply or not.
            self._accept(mail, content)
            await self._speaker.wire.flush()
            await asyncio.sleep(profile.reply_delay_s)
            for _ in range(profile.blank_lines):
                self._speaker.wire.say("")
                await self._speaker.wire.flush()
            store = self._backend.store
            receiver_id = "" if store is None else store.receiver_id
            text = profile.accepted.format(id=receiver_id + self._backend.policy.new_id())
            self._speaker.say(250, text)

    def _accept(self, mail: BegunMail, content: bytes) -> None:
        backend, visit = self._backend, self._visit
        backend.policy.accept(visit, time.monotonic())
        recipients = tuple(mail.recipients)
        if backend.store is not None:
            backend.store.add(
                content,
                started_at=mail.started_at,
                mail_from=mail.mail_from,
                rcpt_tos=recipients,
            )
        backend.tally.accept(
            AcceptedMail(
                message_id=message_id_of(content),
                mail_from=mail.mail_from,
                recipients=recipients,
                started_at=mail.started_at,
                received_at=time.time(),
                connection=visit.number,
                helo=visit.helo,
                account=visit.account,
                bytes=len(content),
            )
        )

    def _too_large(self) -> None:
        self._speaker.error(552, "5.3.4", "Message size exceeds fixed limit")
