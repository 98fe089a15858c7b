"""The Message-IDs of jobs: the dispatcher writes them, the scheduler shows them."""

from __future__ import annotations

import re

import idna
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox_server.shared.database.models import Installation, Sender

_SAFE_ID = re.compile(r"[A-Za-z0-9-]+")
_OURS = re.compile(r"<outbox\.(\d{1,19})\.([A-Za-z0-9-]+)@[^>]*>")


def message_id_for(job_id: int, address: str, installation_id: str) -> str:
    """Return the Message-ID of a job: the same for all its attempts, and globally unique.

    It has the domain of `address` (see `message_id_address`). Two installations may have equal job
    ids, so it also contains `installation_id` (letters, digits, hyphens). RFC 5322, 3.6.4.
    """
    if not _SAFE_ID.fullmatch(installation_id):
        raise ValueError(
            f"installation_id must be letters, digits and hyphens (got {installation_id!r})"
        )
    domain = address.rpartition("@")[2]
    if not domain.isascii():
        domain = idna.encode(domain, uts46=True).decode("ascii")
    return f"<outbox.{job_id}.{installation_id}@{domain}>"


def message_id_address() -> ColumnElement[str]:
    """Return the sender's first address, which `message_id_for` uses because it never changes."""
    return func.coalesce(Sender.first_email, Sender.email)


def job_of_message_id(message_id: str, installation_id: str) -> int | None:
    """Return the job of a Message-ID; None if it is not from this installation."""
    found = _OURS.fullmatch(message_id)
    return int(found[1]) if found and found[2] == installation_id else None


async def installation_id(connection: AsyncConnection) -> str:
    """Return the unique id of this installation, which the first call creates."""
    await connection.execute(insert(Installation).on_conflict_do_nothing())
    return (await connection.execute(select(Installation.installation_id))).scalar_one()
