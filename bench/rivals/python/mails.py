"""The mail of all contenders, over connections that are kept, and its row in PostgreSQL."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime
from email.message import EmailMessage
from typing import Any, Final

import aiosmtplib
import asyncpg

SUBJECT: Final = "Your order {order}"
TEXT: Final = "Dear {name},\n\nyour order {order} leaves {city} today.\n\nThe shop\n"
HTML: Final = "<p>Dear {name},</p><p>your order <b>{order}</b> leaves {city} today.</p>"
_SENT: Final = """
    UPDATE mails SET state = 3, started_at = $2, sent_at = clock_timestamp(), reply = $3
    WHERE id = $1
"""
ROWS: Final = 'SELECT id, sender, recipient, name, "order", city FROM mails ORDER BY id'


class PooledMailer:
    """Sends mails over as many connections as mails are in flight."""

    def __init__(self) -> None:
        self._idle: asyncio.LifoQueue[aiosmtplib.SMTP] = asyncio.LifoQueue()
        self._database: Any = None

    async def open(self) -> None:
        """Connect to PostgreSQL. SMTP connections are opened when they are needed."""
        self._database = await asyncpg.create_pool(os.environ["DATABASE_URL"], max_size=20)

    async def close(self) -> None:
        """Close all connections."""
        while not self._idle.empty():
            self._idle.get_nowait().close()
        await self._database.close()

    async def send(self, row: dict[str, Any]) -> None:
        """Send one mail, and record it."""
        started = datetime.now(UTC)
        message = EmailMessage()
        message["From"], message["To"] = row["sender"], row["recipient"]
        message["Subject"] = SUBJECT.format_map(row)
        message.set_content(TEXT.format_map(row))
        message.add_alternative(HTML.format_map(row), subtype="html")
        try:
            client, reply = await self._deliver(message)
        except aiosmtplib.SMTPServerDisconnected:
            # Servers close connections that are kept: a pooled client uses another one then.
            client, reply = await self._deliver(message)
        self._idle.put_nowait(client)
        await self._database.execute(_SENT, row["id"], started, reply)

    async def _deliver(self, message: EmailMessage) -> tuple[aiosmtplib.SMTP, str]:
        """Send a message; return the connection that it used, and the reply."""
        client = await self._client()
        try:
            _, reply = await client.send_message(message)
        except BaseException:
            client.close()
            raise
        return client, reply

    async def _client(self) -> aiosmtplib.SMTP:
        if not self._idle.empty():
            return self._idle.get_nowait()
        client = aiosmtplib.SMTP(
            hostname="127.0.0.1", port=int(os.environ["SMTP_PORT"]), start_tls=False
        )
        await client.connect()
        return client
