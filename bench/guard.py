"""`python -m bench.guard`: fails if sending or intake has become slower than recorded.

It divides the processor time of a mail by that of a bare SMTP client, and the processor time of an
uploaded row by that of a bare COPY. Both are measured in the same run, so a slow or busy machine
changes both sides. bench/guard.json has the ratios of the present code; a third of the speed lost
is 1.5 times the cost. If a try is above the limit it is repeated: other work on the machine raises
single tries, and slower code raises all of them.

Where other programs use much of the machine, even ratios say nothing: processes that wait
for the processor find their caches cold and work in other groups. Such a try does not count, and
if none counts, the guard says so and checks nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import grpc

from bench.bench import Bench, run_to_end
from bench.dispatching import fill_due, settings_for
from bench.filling import add_jobs, add_senders
from bench.intake import COPIED, COPY_INTO
from bench.processor_time import processor_seconds
from bench.rivals.installing import InstalledRivals
from bench.scheduling import a_month_later, create_senders, csv_of, options_of, upload
from bench.size import SHORT
from bench.watching import SENT, watch
from bench.world import smtp_sink
from outbox_server.deploy.embedded.stack import Servers
from outbox_server.shared.database.migrating import migrate

RECORDED: Final = Path(__file__).with_name("guard.json")
# How often the recorded cost is allowed: below 1.5, which is a third of the speed.
MARGIN: Final = 1.4
# Below this part of it, the record is out of date, and a loss could hide behind it.
_FASTER: Final = 0.65
_TRIES: Final = 3
# No try begins that would probably end after this many seconds.
_LIMIT_S: Final = 55.0
# A busy loop that needs more than this many seconds per second of processor time does not count.
CROWDED: Final = 1.3
_LOOP_S: Final = 0.2
_MAILS: Final = 6_000
_SENDERS: Final = 100
_ROWS: Final = 60_000

Ratios = Mapping[str, float]


def exceeded(tries: Sequence[Ratios], recorded: Ratios) -> dict[str, float]:
    """Return the ratios that were above the limit in every try, each at its lowest."""
    lowest = {name: min(one[name] for one in tries) for name in recorded}
    return {name: value for name, value in lowest.items() if value > recorded[name] * MARGIN}


def outdated(tries: Sequence[Ratios], recorded: Ratios) -> list[str]:
    """Return the names whose cost is now so low that the record should be renewed."""
    return [name for name in recorded if max(one[name] for one in tries) < recorded[name] * _FASTER]


async def _mail_ratios(bench: Bench) -> dict[str, float]:
    probe = [sys.executable, "-m", "bench.bare_sender", str(bench.smtp_port)]
    bare = float(await run_to_end(probe, None, Path.cwd()))
    async with bench.fresh() as stack:
        async with bench.connected(stack.database_url) as connection:
            total = await fill_due(connection, _SENDERS, _MAILS)
        with stack.process("dispatcher", **settings_for(50)) as process:
            pids = stack.stores | {"dispatcher": process.pid}
            found = await watch(bench, stack.database_url, SENT, total, pids)
    return {name: found[f"{name}_us"] / bare for name in ("dispatcher", "postgresql", "redis")}


async def _row_ratios(bench: Bench) -> dict[str, float]:
    async with bench.fresh() as stack, bench.connected(stack.database_url) as connection:
        postgres = {"postgresql": stack.stores["postgresql"]}
        ids = await add_senders(connection, 1)
        await add_jobs(connection, ids, _ROWS, start=a_month_later())
        async with connection.cursor().copy(COPIED) as copy:
            prepared = b"".join([bytes(part) async for part in copy])
        await connection.execute("TRUNCATE email_jobs")
        before, own = processor_seconds(postgres), time.process_time()
        async with connection.cursor().copy(COPY_INTO) as copy:
            for first in range(0, len(prepared), 256 * 1024):
                await copy.write(prepared[first : first + 256 * 1024])
        own = time.process_time() - own
        bare = own + processor_seconds(postgres)["postgresql"] - before["postgresql"]
        with stack.process("scheduler") as process:
            pids = postgres | {"scheduler": process.pid}
            async with grpc.aio.insecure_channel(stack.scheduler) as channel:
                (sender,) = await create_senders(channel, 1)
                csv = csv_of(_ROWS, "g")
                # So that the workers of templates exist.
                await upload(channel, options_of(sender, a_month_later()), csv_of(10, "w"))
                before = processor_seconds(pids)
                await upload(channel, options_of(sender, a_month_later()), csv)
                after = processor_seconds(pids)
    return {"upload": sum(after[name] - before[name] for name in pids) / bare}


def crowding() -> float:
    """Return the seconds that one second of processor time takes at this moment."""
    began, used = time.monotonic(), time.process_time()
    while time.process_time() - used < _LOOP_S:
        pass
    return (time.monotonic() - began) / (time.process_time() - used)


async def measure(recorded: Ratios | None) -> list[Ratios]:
    """Return the ratios of each try that counts; stop after the first one within all limits."""
    found: list[Ratios] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="guard-", dir="build") as folder, smtp_sink() as sink:
        async with Servers(Path(folder), inbox=False) as servers:
            await asyncio.to_thread(migrate, servers.database_url)
            bench = Bench(servers, *sink, SHORT, InstalledRivals(), print)
            for number in range(1, _TRIES + 1):
                began, crowded = time.monotonic(), crowding()
                ratios = await _mail_ratios(bench)
                crowded = max(crowded, crowding())
                ratios |= await _row_ratios(bench)
                crowded = max(crowded, crowding())
                _say(f"try {number}", ratios | {"seconds per second of processor time": crowded})
                if crowded <= CROWDED:
                    found.append(ratios)
                if recorded is not None:
                    if found and not exceeded(found, recorded):
                        break
                    now = time.monotonic()
                    if now - started + (now - began) > _LIMIT_S:
                        break
    return found


def _say(what: str, ratios: Ratios) -> None:
    said = ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())
    print(f"{what}: {said}", flush=True)


def main() -> int:
    """Compare the cost of mails and rows with bare probes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--record", action="store_true", help="record the ratios of this code")
    record = parser.parse_args().record
    Path("build").mkdir(exist_ok=True)
    if record:
        tries = asyncio.run(measure(None))
        if not tries:
            print("not recorded: other programs use too much of the machine")
            return 1
        ratios = {
            name: round(sorted(one[name] for one in tries)[len(tries) // 2], 2) for name in tries[0]
        }
        RECORDED.write_text(json.dumps(ratios, indent=2) + "\n", encoding="utf-8")
        _say("recorded", ratios)
        return 0
    if not RECORDED.exists():
        print(f"{RECORDED.name} is missing: make bench-guard-record, while the machine is quiet")
        return 1
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    tries = asyncio.run(measure(recorded))
    if not tries:
        print("nothing was checked: other programs use too much of the machine")
        return 0
    _say("recorded", recorded)
    for name in outdated(tries, recorded):
        print(f"{name} costs less than {_FASTER:.0%} of the record: make bench-guard-record")
    too_much = exceeded(tries, recorded)
    for name, value in too_much.items():
        print(
            f"{name} costs {value:.2f} times its probe in the best of {len(tries)} tries; allowed "
            f"is {recorded[name] * MARGIN:.2f}, {MARGIN} times the record of {recorded[name]}"
        )
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())
