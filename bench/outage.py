"""`python -m bench.outage`: a relay is down for ten minutes while 10,000 mails are due.

Half of the senders have a gap of 2 s. The others have no gap and a limit that they reach at once.
The cost of the outage is read from PostgreSQL; the mail that follows, and its rate, from the SMTP
side.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Final

import psycopg
from rich.console import Console
from rich.table import Table

from bench.world import BenchStack
from outbox_server.deploy.embedded.proxy import TcpProxy
from outbox_server.deploy.embedded.stack import Servers
from outbox_server.deploy.record import ReceivedMail
from outbox_server.shared.audit.replay import least_gap, most_in_window
from outbox_server.shared.database.migrating import migrate
from outbox_server.shared.durations import parse_duration
from outbox_server.shared.states import AttemptOutcome, JobState

SENDERS, MAILS, LIMIT = 50, 200, 50
GAP: Final = timedelta(seconds=2)
# The longest wait of the backoff, with a tenth of jitter and a margin.
_PATIENCE_S = 160.0

_FILL = (
    """
    INSERT INTO senders (user_id, email, hourly_limit, min_gap_ms, max_in_flight)
    SELECT 'bench', CASE i %% 2 WHEN 0 THEN 'paced' ELSE 'limited' END || i || '@example.com',
           CASE i %% 2 WHEN 0 THEN 1000000 ELSE %(limit)s END,
           CASE i %% 2 WHEN 0 THEN %(gap)s END, 5
    FROM generate_series(1, %(senders)s) AS i
    """,
    """
    INSERT INTO batches (user_id, sender_id, request_id, request_hash, subject, body, start_at,
                         duplicates, mode, accepted_count)
    SELECT user_id, id, 'r' || id, '\\x00', 'Mail', 'Hello', now(), 1, 1, %(mails)s FROM senders
    """,
    """
    INSERT INTO email_jobs (batch_id, sender_id, scheduled_at, row_number, recipient)
    SELECT b.id, sender_id, now(), i, 'r' || i || '@example.net'
    FROM batches AS b, generate_series(1, %(mails)s) AS i
    """,
    "ANALYZE",
)
_SPENT = """
    SELECT count(*), count(DISTINCT email_job_id), coalesce(max(attempt), 0) FROM attempts
    WHERE outcome <> %s
"""
_STATES = "SELECT state, count(*) FROM email_jobs GROUP BY state"


async def outage(
    stack: BenchStack, servers: Servers, proxy: TcpProxy, how: argparse.Namespace
) -> None:
    """Take the relay down, bring it back, and print the results."""
    inbox = servers.inbox
    if inbox is None:
        raise RuntimeError("there is no relay")
    size = {"senders": SENDERS, "mails": MAILS, "limit": LIMIT, "gap": GAP.total_seconds() * 1000}
    proxy.refuse()
    async with await psycopg.AsyncConnection.connect(
        servers.database_url, autocommit=True
    ) as connection:
        for statement in _FILL:
            await connection.execute(statement, size)
        with ExitStack() as dispatchers:
            for _ in range(how.dispatchers):
                process = stack.process(
                    "dispatcher", rate_window=how.window, log_level=how.log_level
                )
                # In a separate thread: this one runs the relay.
                await asyncio.to_thread(dispatchers.enter_context, process)
            await asyncio.sleep(how.seconds)
            spent = await _row(connection, _SPENT, int(AttemptOutcome.SENT))
            proxy.heal()
            healed = time.time()
            await _until_paced_are_done(inbox.mails, healed)
            states = await (await connection.execute(_STATES)).fetchall()
            afterwards = await _row(connection, _SPENT, int(AttemptOutcome.SENT))
            await asyncio.to_thread(dispatchers.close)
    figures = {
        "seconds of outage": how.seconds,
        "attempts that it used up": spent[0],
        "mails that they were of": spent[1],
        "most attempts of one mail": spent[2],
        "such attempts after it": afterwards[0] - spent[0],
        **{f"mails {JobState(state).name}": n for state, n in sorted(states)},
        **_seen(inbox.mails, healed, parse_duration(how.window)),
    }
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)


async def _row(
    connection: psycopg.AsyncConnection[tuple[int, ...]], query: str, *given: int
) -> tuple[int, ...]:
    row = await (await connection.execute(query, given)).fetchone()
    if row is None:
        raise RuntimeError(query)
    return row


async def _until_paced_are_done(mails: Sequence[ReceivedMail], healed: float) -> None:
    patience = healed + _PATIENCE_S + 2 * MAILS * GAP.total_seconds()
    while sum(each.mail_from.startswith("paced") for each in mails) < SENDERS // 2 * MAILS:
        if time.time() > patience:
            raise SystemExit(f"only {len(mails)} mails came after the outage")
        await asyncio.sleep(1)


def _seen(
    mails: Iterable[ReceivedMail], healed: float, window: timedelta
) -> dict[str, float | int]:
    by_sender: dict[str, list[ReceivedMail]] = {}
    for mail in mails:
        by_sender.setdefault(mail.mail_from, []).append(mail)
    paced = [each for name, each in by_sender.items() if name.startswith("paced")]
    limited = [each for name, each in by_sender.items() if name.startswith("limited")]
    copies = sum(len(each) - len({mail.message_id for mail in each}) for each in by_sender.values())
    first = min(mail.received_at for each in by_sender.values() for mail in each)
    gaps = [least_gap((mail.started_at, mail.received_at) for mail in each) for each in paced]
    seconds = window.total_seconds()
    return {
        "first mail after it, s": first - healed,
        "mails that came twice": copies,
        "least gap of those that have one, s": min(gap for gap in gaps if gap is not None),
        "most mails of one of them in 60 s": max(_most(each, 60) for each in paced),
        f"most mails of the others in {seconds:,.0f} s": max(
            _most(each, seconds) for each in limited
        ),
        "least of the others in it": min(_most(each, seconds) for each in limited),
    }


def _most(mails: Iterable[ReceivedMail], seconds: float) -> int:
    return most_in_window((mail.received_at for mail in mails), seconds)


async def _run(how: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="outbox-bench-") as folder:
        async with Servers(Path(folder)) as servers:
            await asyncio.to_thread(migrate, servers.database_url)
            inbox = servers.inbox
            async with TcpProxy(lambda: inbox.port if inbox else 0) as proxy:
                await outage(BenchStack(servers, proxy.port), servers, proxy, how)


def main() -> int:
    """Run one outage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="of outage (default 600)")
    parser.add_argument("--window", default="1h", help="in which a limit holds (default 1h)")
    parser.add_argument("--dispatchers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--log-level", default="error", help="of the dispatchers (default error)")
    asyncio.run(_run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
