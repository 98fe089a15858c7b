"""Outbox sends to a real mail server; its Maildir shows the mail that arrived."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from outbox_server.deploy.ports import LOOPBACK
from outbox_server.shared.database.message_ids import installation_id, message_id_for
from outbox_server.shared.secrets import SecretBox, generate_key
from outbox_server.shared.settings import Settings
from outbox_server.shared.states import JobState, ReplyClass, SmtpSecurity
from tests.dispatchers import running, settings_of
from tests.eventually import eventually
from tests.mail_servers.server import PASSWORD, USERNAME, DeliveredMail, MailServer
from tests.world import World, address_of

ENCRYPTION_KEY: Final = generate_key()
MAILS: Final = 30
# Bodies that a transport could change: dots at line starts, long lines, non-ASCII bytes.
ODD_BODIES: Final = (
    "",
    ".",
    "..",
    ".\n.\n",
    "\n.\n",
    "a\n.\nQUIT\n",
    ".hidden\n..twice\n...three times\n",
    "From here to there\n>From there\n",
    "\n\nblank lines before and after\n\n\n",
    "spaces at the end   \ntab at the end\t\n \n",
    "x" * 997,
    "." * 998,
    ".\n" * 500,
    "x" * 5000,
    ("." + "y" * 996 + "\n") * 20,
    "Grüße aus Köln\n",
    ".Grüße\n..Grüße\n" * 50,
    "Привет, мир\n.\n" * 50,
    "日本語のメール\n" * 200,
    "😀 " * 2000,
    "=20 is no space, =?utf-8?q?and_this_no_word?=\n",
    "a bare carriage return\rin a line\n",
    "bell \x07 and escape \x1b[31m\n",
    "%s %d {{ text }} ${if} $mail_host \\n\n",
    "-- \nsignature\n",
    "Subject: not a header\n\n.\n",
    ("word " * 200 + "\n") * 3,
    "\ufeffbyte order mark\n",
    "null sender? <>\n",
    "z" * 76 + "\n" + "z" * 77 + "\n",
)
# The mail's own headers, in the order in which Outbox writes them.
_HEADERS: Final = [
    "From",
    "To",
    "Subject",
    "Date",
    "Message-ID",
    "MIME-Version",
    "Content-Type",
    "Content-Transfer-Encoding",
]


@dataclass(frozen=True)
class ScheduledMail:
    """One job and the expected mail."""

    job: int
    message_id: str
    mail_from: str
    recipient: str
    text: str


class SendingRun:
    """A dispatcher that runs against a mail server."""

    def __init__(self, world: World, server: MailServer) -> None:
        self.world = world
        self.server = server

    async def sender(self, **more: Any) -> int:
        """Add a sender whose endpoint is the server, with STARTTLS and AUTH."""
        box = SecretBox([ENCRYPTION_KEY])
        endpoint: dict[str, Any] = {
            "smtp_host": LOOPBACK,
            "smtp_port": self.server.port,
            "smtp_security": int(SmtpSecurity.STARTTLS),
            "smtp_username": USERNAME,
            "smtp_password": box.encrypt(PASSWORD),
        }
        return await self.world.sender(**(endpoint | more))

    async def schedule(
        self, sender: int, texts: Iterable[str] = ("Hello\n",) * MAILS, **recipients: str
    ) -> list[ScheduledMail]:
        """Schedule one mail for each text, due now.

        `recipients` replaces addresses: `r3="x@y.test"` sets that of the third mail.
        """
        texts = list(texts)
        jobs = await self.world.schedule(sender, len(texts), due=timedelta(hours=1), load=False)
        [batch] = await self.world.sql(
            "SELECT batch_id AS id FROM email_jobs WHERE id = %s", jobs[0]
        )
        await self.world.sql(
            "UPDATE batches SET body = '{{ text }}', variable_names = '{text}' WHERE id = %s",
            batch.id,
        )
        for number, (job, text) in enumerate(zip(jobs, texts, strict=True), start=1):
            recipient = recipients.get(f"r{number}", f"r{number}@y.test")
            await self.world.sql(
                "UPDATE email_jobs SET variables = %s, recipient = %s WHERE id = %s",
                json.dumps([text]),
                recipient,
                job,
            )
        scheduled = await self._scheduled(sender, jobs, texts)
        await self.world.due_now(sender)
        return scheduled

    async def _scheduled(
        self, sender: int, jobs: Sequence[int], texts: Sequence[str]
    ) -> list[ScheduledMail]:
        # A dispatcher reads the id when it sends its first mail, and would create it then.
        async with self.world.engine.begin() as connection:
            installation = await installation_id(connection)
        address = address_of(sender)
        return [
            ScheduledMail(
                job,
                message_id_for(job, address, installation),
                address,
                (await self.world.job(job)).recipient,
                text,
            )
            for job, text in zip(jobs, texts, strict=True)
        ]

    async def finished(self) -> None:
        """Wait until every job is in a final state and the server has delivered its mail."""
        await eventually(self.world.done)
        await eventually(lambda: self.server.queued() == 0)

    async def check_arrived(self, scheduled: Sequence[ScheduledMail]) -> None:
        """Wait for the end; check that exactly these mails arrived, each once and unchanged."""
        await self.finished()
        mails = self.server.mails()
        assert Counter(mail.message_id for mail in mails) == Counter(
            mail.message_id for mail in scheduled
        )
        arrived = {mail.message_id: mail for mail in mails}
        for expected in scheduled:
            check_unchanged(arrived[expected.message_id], expected)
        await self.world.check_counts()

    async def check_all_sent(self, scheduled: Sequence[ScheduledMail]) -> None:
        """Wait for the end; check that each mail was delivered once, unchanged, and is SENT."""
        await self.check_arrived(scheduled)
        assert await self.world.states() == {JobState.SENT: len(scheduled)}

    async def check_no_attempt_used(self) -> None:
        """Check that no refusal counted as a failed attempt."""
        used = await self.world.sql("SELECT id, failures FROM email_jobs WHERE failures > 0")
        assert used == []

    async def classes(self, job: int) -> list[ReplyClass | None]:
        """Return the class of the server's reply to each recorded attempt at a job."""
        rows = await self.world.sql(
            "SELECT reply_class FROM attempts WHERE email_job_id = %s ORDER BY attempt", job
        )
        return [None if row.reply_class is None else ReplyClass(row.reply_class) for row in rows]


def check_unchanged(mail: DeliveredMail, expected: ScheduledMail) -> None:
    """Compare a delivered mail with the scheduled one: every header and the text."""
    parsed = mail.parsed
    assert parsed.keys() == _HEADERS, parsed.keys()
    assert not parsed.defects, parsed.defects
    assert parsed["From"] == expected.mail_from
    assert parsed["To"] == expected.recipient
    assert parsed["Subject"] == "Mail"
    # In transit, line ends become CRLF; an unencoded last line without a line end gets one.
    text = expected.text.replace("\r\n", "\n").replace("\r", "\n")
    content = parsed.get_content().replace("\r\n", "\n")
    allowed = (text,) if text.endswith("\n") else (text, f"{text}\n")
    assert content in allowed, f"{content[:200]!r} is not {text[:200]!r}"
    assert f"<{expected.mail_from}>" in mail.trace


@asynccontextmanager
async def sending(server: MailServer, values: dict[str, str]) -> AsyncIterator[SendingRun]:
    """Run a dispatcher for a mail server that has been started."""
    settings: Settings = settings_of(values | {"encryption_keys": ENCRYPTION_KEY})
    async with World(settings) as world, running(settings):
        yield SendingRun(world, server)
