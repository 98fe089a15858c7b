"""The row of many senders with an account of their own on a server with STARTTLS and AUTH."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Final

from bench.bench import Bench, Connection, run_to_end
from bench.filling import add_jobs, add_senders
from bench.processor_time import processor_seconds
from bench.results import OUTBOX, Figures, RatioTarget
from bench.row import BenchRow
from bench.size import BenchSize
from bench.watching import SENT
from bench.world import program
from outbox_server.deploy.certificates import self_signed
from outbox_server.shared.secrets import SecretBox, generate_key

_ACCOUNTS: Final = 1_000
_AWAY_MS: Final = 20
_PERIOD_S: Final = 3
_NODEMAILER: Final = "nodemailer"
_ON_TIME_MS: Final = 1_000
_LATE_S: Final = 60
_ENDPOINTS: Final = """
    UPDATE senders SET smtp_host = '127.0.0.1', smtp_port = %(port)s, smtp_security = 2,
           smtp_username = 'user' || id, smtp_password = %(password)s
"""
_LATENESS: Final = """
    SELECT count(*), count(*) FILTER (WHERE late < %(limit)s) * 100.0 / count(*),
           percentile_cont(0.99) WITHIN GROUP (ORDER BY late), max(late)
    FROM (SELECT 1000 * extract(epoch FROM a.started_at - j.scheduled_at) AS late
          FROM attempts AS a JOIN email_jobs AS j ON j.id = a.email_job_id
          WHERE a.outcome = 1) AS each
"""


def _mails_each(size: BenchSize) -> int:
    return max(3, size.seconds // _PERIOD_S)


@contextmanager
def _server(folder: Path) -> Iterator[tuple[int, Path]]:
    """Run the server and the proxy; yield the port of the proxy and the file of the CA."""
    certificate = self_signed(folder)
    sink = (sys.executable, "-m", "bench.sink", "--auth")
    tls = ("--certificate", str(certificate.public), "--key", str(certificate.private))
    with (
        program(*sink, *tls) as (_, port),
        program(sys.executable, "-m", "bench.delaying_proxy", str(port), str(_AWAY_MS)) as (
            _,
            away,
        ),
    ):
        yield away, certificate.public


async def _outbox(bench: Bench, number: int) -> Figures:
    del number
    each, key = _mails_each(bench.size), generate_key()
    lead = await bench.lead_s()
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as (port, authority):
        async with bench.fresh() as stack, bench.connected(stack.database_url) as connection:
            ids = await add_senders(connection, _ACCOUNTS)
            password = SecretBox([key]).encrypt("secret")
            await connection.execute(_ENDPOINTS, {"port": port, "password": password})
            begin = time.time() + lead
            row = await (await connection.execute("SELECT to_timestamp(%s)", [begin])).fetchone()
            spacing = timedelta(seconds=_PERIOD_S)
            await add_jobs(connection, ids, each, start=row[0] if row else None, spacing=spacing)
            settings = {
                "dispatcher_concurrency": "200",
                "smtp_allow": "127.0.0.0/8",
                "smtp_ports": "any",
                "smtp_ca": str(authority),
                "encryption_keys": key,
            }
            with stack.process("dispatcher", **settings) as process:
                pids = stack.stores | {"dispatcher": process.pid}
                await asyncio.sleep(begin + _PERIOD_S - time.time())
                before, sent_before = processor_seconds(pids), await _sent(connection)
                await asyncio.sleep(begin + each * _PERIOD_S - time.time())
                await _until_sent(connection, _ACCOUNTS * each)
                used, sent = processor_seconds(pids), await _sent(connection)
            found = await (await connection.execute(_LATENESS, {"limit": _ON_TIME_MS})).fetchone()
    if found is None or sent <= sent_before:
        raise RuntimeError("no mail was sent after the first of each sender")
    mails = sent - sent_before
    costs = {f"{name}_us": (used[name] - before[name]) / mails * 1e6 for name in pids}
    return costs | {
        "sent_percent": found[0] * 100 / (_ACCOUNTS * each),
        "on_time_percent": float(found[1]) * found[0] / (_ACCOUNTS * each),
        "late_ms_p99": float(found[2]),
        "late_ms_max": float(found[3]),
    }


async def _until_sent(connection: Connection, total: int) -> None:
    """Wait for mail that is late, for a while: what is never sent is seen in the figures."""
    limit = time.monotonic() + _LATE_S
    while time.monotonic() < limit:
        if await _sent(connection) >= total:
            return
        await asyncio.sleep(0.2)


async def _sent(connection: Connection) -> int:
    row = await (await connection.execute(SENT.encode())).fetchone()
    return int(row[0]) if row else 0


async def _nodemailer(bench: Bench, number: int) -> Figures:
    del number
    node, scripts = bench.rivals.node()
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as (port, authority):
        env = os.environ | {
            "ACCOUNTS": str(_ACCOUNTS),
            "PERIOD_MS": str(_PERIOD_S * 1000),
            "ROUNDS": str(_mails_each(bench.size)),
            "SMTP_PORT": str(port),
            "CA_FILE": str(authority),
        }
        found = json.loads(await run_to_end([node, "accounts.js"], env, scripts))
    return {
        "dispatcher_us": found["us_per_mail"],
        "sent_percent": 100 - found["failed"] * 100 / (_ACCOUNTS * _mails_each(bench.size)),
        "late_ms_p99": found["late_ms_p99"],
        "late_ms_max": found["late_ms_max"],
    }


ROWS: Final = (
    BenchRow(
        "dispatch_accounts",
        f"senders with an account each on a server with STARTTLS and AUTH, {_AWAY_MS} ms away, one "
        f"mail every {_PERIOD_S} s each; on time: begun within {_ON_TIME_MS} ms",
        {OUTBOX: _outbox, _NODEMAILER: _nodemailer},
        (
            RatioTarget((OUTBOX, "on_time_percent"), 100.0, least=1.0),
            RatioTarget((OUTBOX, "dispatcher_us"), ((_NODEMAILER, "dispatcher_us"),), most=0.5),
        ),
        size=lambda size: f"{_ACCOUNTS:,} senders, {_mails_each(size)} mails each",
        notes=(
            "nodemailer: one pooled transport per account, and timers: no queue, store or limits",
            "processor time after the first mail of each sender, when all sessions are open",
        ),
    ),
)
