"""Rows whose measures stop with an error where a promise is broken."""

from __future__ import annotations

from typing import Final

from bench.bench import Bench
from bench.healing import SENDERS, WAITING, healing
from bench.hostile import PROMISED_STALL_MS, hostile
from bench.results import OUTBOX, Figures, RatioTarget
from bench.row import BenchRow


async def _healing(bench: Bench, number: int) -> Figures:
    del number
    async with bench.fresh() as stack:
        return await healing(stack)


async def _hostile(bench: Bench, number: int) -> Figures:
    del number
    async with bench.fresh() as stack:
        return await hostile(stack)


ROWS: Final = (
    BenchRow(
        "healing",
        "an emptied Redis under load: until it is rebuilt, and the longest time without a send",
        {OUTBOX: _healing},
        (RatioTarget((OUTBOX, "silence_after_flushall_s"), 3.0, most=1.0),),
        size=lambda _: f"{SENDERS * WAITING:,} waiting jobs",
    ),
    BenchRow(
        "hostile",
        "the longest stall of an event loop while a user sends costly templates; on a machine with "
        "other work, the time may be that of others",
        {OUTBOX: _hostile},
        (RatioTarget((OUTBOX, "hostile_longest_stall_ms"), float(PROMISED_STALL_MS), most=1.0),),
        size=lambda _: "200 mails of each of two users",
    ),
)
