"""`python -m bench.neighbours [KIND...]`: what the calls of one user do to those of another.

Ann makes a few calls one after the other. Eve, in a process of her own, does what may slow them
down. Her process is stopped and continued in turns, so that quiet and loaded figures are of the
same minute. It has the lowest priority, so that her client takes no processor from the servers.
The kind `processor` is for comparison: without a call, two cores are busy at the usual priority.

The last column is what the scheduler, PostgreSQL and Eve's process use of a core, quiet and beside.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from bench.floods import CONTROL, KINDS, Call, Client, Eve
from bench.processor_time import processor_seconds
from bench.world import BenchStack, world
from outbox_server.deploy.certificates import self_signed
from outbox_server.shared.auth.keys import ApiKeyKind, make_key
from outbox_server.shared.auth.store import insert_key
from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.secrets import generate_key
from outbox_server.shared.settings import load_settings

# Ann's calls of each kind in a round, quiet and loaded.
_CALLS: Final = 75
_ROUNDS: Final = 8
# Between two of Ann's calls, and until Eve's flood has begun or ended.
_PAUSE_S, _SETTLE_S = 0.005, 1.5
_METHODS: Final = ("GetSender", "ScheduleBatch", "GetSenderStats")


async def _measure(ann: Client, found: dict[str, list[float]]) -> None:
    calls: Sequence[Call] = (ann.get, ann.schedule, ann.count)
    for _ in range(_CALLS):
        for name, call in zip(_METHODS, calls, strict=True):
            began = time.perf_counter()
            await call()
            found[name].append(1000 * (time.perf_counter() - began))
            await asyncio.sleep(_PAUSE_S)


async def _beside(
    ann: Client, eve: subprocess.Popen[bytes], servers: Mapping[str, int]
) -> tuple[Any, Any, str]:
    """Return Ann's latencies in ms, by method: while Eve is stopped, and while she is not.

    Also return what `servers` and Eve use of a core, as a text.
    """
    quiet, loaded = ({name: list[float]() for name in _METHODS} for _ in range(2))
    pids = {**servers, "eve": eve.pid}
    used: dict[signal.Signals, dict[str, float]] = {}
    for _ in range(_ROUNDS):
        for found, state in ((quiet, signal.SIGSTOP), (loaded, signal.SIGCONT)):
            if eve.poll() is not None:
                raise SystemExit("Eve's process ended")
            eve.send_signal(state)
            await asyncio.sleep(_SETTLE_S)
            before, began = processor_seconds(pids), time.monotonic()
            await _measure(ann, found)
            total = used.setdefault(state, dict.fromkeys((*pids, "time"), 0.0))
            total["time"] += time.monotonic() - began
            for name, seconds in processor_seconds(pids).items():
                total[name] += seconds - before[name]
    shares = (
        f"{name} {used[signal.SIGSTOP][name] / used[signal.SIGSTOP]['time']:.2f}"
        f" -> {used[signal.SIGCONT][name] / used[signal.SIGCONT]['time']:.2f}"
        for name in pids
    )
    return quiet, loaded, ", ".join(shares)


async def _keys(stack: BenchStack) -> list[str]:
    engine = create_engine(load_settings(database_url=stack.database_url))
    texts = []
    async with engine.begin() as connection:
        for user in ("ann", "eve"):
            key = make_key()
            await insert_key(connection, key, ApiKeyKind.USER, user, "")
            texts.append(key.text)
    await engine.dispose()
    return texts


@contextmanager
def _running(*argv: str, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-m", *argv], env={**os.environ, **env})
    try:
        yield child
    finally:
        child.send_signal(signal.SIGCONT)
        child.terminate()
        child.wait()


async def _run(kinds: Sequence[str]) -> None:
    async with AsyncExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="neighbours-")))
        stack = await opened.enter_async_context(world(folder))
        ann_key, eve_key = await _keys(stack)
        certificate = self_signed(folder)
        env = stack.environment(
            auth="keys",
            tls_certificate=str(certificate.public),
            tls_key=str(certificate.private),
            user_waiting_jobs="100000000",
            user_suppressions="100000000",
            webhook_allow="127.0.0.0/8",
            encryption_keys=generate_key(),
            scheduler_listen=stack.scheduler,
            stats_listen=stack.stats,
        )
        children = {
            service: opened.enter_context(_running(f"outbox_server.services.{service}", env=env))
            for service in ("scheduler", "stats")
        }
        pids = {
            "scheduler": children["scheduler"].pid,
            "postgresql": stack.stores["postgresql"],
        }
        servers = (stack.scheduler, stack.stats)
        ann = Client(*servers, ann_key, certificate.public.read_bytes())
        await ann.open()
        await _measure(ann, {name: [] for name in _METHODS})
        print(f"{'beside':<12}" + "".join(f"{name + ', ms':>38}" for name in _METHODS))
        for kind in kinds:
            argv = ("bench.neighbours", "--eve", kind, *servers, str(certificate.public))
            with _running(*argv, env={"EVE_KEY": eve_key}) as eve:
                await asyncio.sleep(2 * _SETTLE_S)
                quiet, loaded, shares = await _beside(ann, eve, pids)
            latencies = "".join(_shown(quiet[n], loaded[n]) for n in _METHODS)
            print(f"{kind:<12}{latencies}  {shares}", flush=True)


def _shown(quiet: list[float], loaded: list[float]) -> str:
    p50, p99 = _percentiles(quiet), _percentiles(loaded)
    texts = (f"{a:.1f}/{b:.1f}" for a, b in (p50, p99))
    return f"{' -> '.join(texts) + f' (x{p99[1] / p50[1]:.1f})':>38}"


def _percentiles(found: list[float]) -> tuple[float, float]:
    ordered = sorted(found)
    return ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]


async def _attack(kind: str, scheduler: str, stats: str, certificate: bytes) -> None:
    eve = Eve(scheduler, stats, os.environ["EVE_KEY"], certificate)
    await eve.open()
    await eve.attack(kind, scheduler)


def main() -> None:
    """Run the kinds that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m bench.neighbours", description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="all by default")
    parser.add_argument("--eve", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.eve:
        kind, scheduler, stats, certificate = asked.eve
        if kind != CONTROL:
            os.nice(19)
        asyncio.run(_attack(kind, scheduler, stats, Path(certificate).read_bytes()))
    else:
        print("median/99th percentile of Ann's calls: quiet -> beside (ratio of the percentiles)")
        asyncio.run(_run(asked.kinds or list(KINDS)))


if __name__ == "__main__":
    main()
