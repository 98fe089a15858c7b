"""`python -m tests.side_by_side TREE`: another release and this one run together, under load.

A drill's stack starts with the code and the schema of TREE, which is a source tree. While mail is
sent, this release migrates the database. Then its processes replace the old ones, one by one; the
old ones replace them; and this release replaces the old ones a second time. At the end the whole
installation is audited.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from outbox_server.deploy.drill.drill import DrillFolder
from outbox_server.deploy.drill.report import DrillReport, renamed_recipients
from outbox_server.deploy.drill.run import Drill
from outbox_server.deploy.drill.stack import DrillStack, Size, drill_settings
from outbox_server.deploy.drill.waiting import until
from outbox_server.deploy.embedded.service import Service
from outbox_server.deploy.record import KeptMails
from outbox_server.shared.audit.installation import audit_installation
from outbox_server.shared.audit.report import AuditReport

THIS: Final = Path(__file__).parents[1]
# Two processes per service, as a rolling upgrade needs.
SIZE: Final = Size(dispatchers=2, schedulers=2, stats=2)
# The time for which both releases send side by side after each replaced process.
_BETWEEN_S: Final = 1.0
_START_LIMIT_S: Final = 60.0
_PASSES: Final = ("upgrade", "roll back", "upgrade again")


@dataclass(frozen=True)
class SourceTree:
    """The source tree of a release."""

    name: str
    path: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which Python imports the release from its tree."""
        return {"PYTHONPATH": f"{self.path}{os.pathsep}{self.path / 'client' / 'src'}"}

    def run(self, *words: str, **variables: str) -> str:
        """Run Python with the code of the tree; return its output.

        Raises:
            SystemExit: it failed.
        """
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.path,
            env={"PATH": os.defpath, **self.environment, **variables},
            capture_output=True,
            check=False,
            text=True,
            timeout=300,
        )
        if done.returncode:
            raise SystemExit(f"{self.name}: {words} failed: {done.stderr}")
        return done.stdout

    def check(self) -> None:
        """Check that Python imports this tree and no other."""
        found = self.run("-c", "import outbox_server.services as s; print(s.__file__)").strip()
        if not Path(found).resolve().is_relative_to(self.path.resolve()):
            raise SystemExit(f"{self.path} is not imported, but {found}")

    def migrate(self, url: str) -> None:
        """Run `outbox migrate` of this release."""
        self.run("-m", "outbox_server.cli", "migrate", OUTBOX_DATABASE_URL=url)


async def _replace(service: Service, tree: SourceTree, say: Callable[[str], None]) -> None:
    """Stop a process as a Deployment does, and start it again with the code of `tree`."""
    old = service.child.pid
    service.begin_with(tree.environment)
    service.child.signal(signal.SIGTERM)

    async def again() -> bool:
        return service.child.pid != old and await service.serving()

    await until(again, _START_LIMIT_S)
    say(f"{service.title} runs {tree.name}")
    await asyncio.sleep(_BETWEEN_S)


async def _roll(
    stack: DrillStack, old: SourceTree, new: SourceTree, say: Callable[[str], None]
) -> None:
    await asyncio.sleep(_BETWEEN_S)
    await asyncio.to_thread(new.migrate, stack.system.servers.database_url)
    say("the schema is migrated; all processes run the old release")
    await asyncio.sleep(_BETWEEN_S)
    for name, tree in zip(_PASSES, (new, old, new), strict=True):
        say(name)
        for service in stack.system.services:
            await _replace(service, tree, say)


async def side_by_side(
    folder: Path, base: SourceTree, *, seed: int, seconds: float, say: Callable[[str], None]
) -> tuple[DrillReport, bool]:
    """Return the report, and whether all processes were replaced while mail was being sent."""
    this = SourceTree("this release", THIS)
    for tree in (base, this):
        tree.check()
    stack = DrillStack(
        folder,
        SIZE,
        drill_settings("resend"),
        lambda text: say(text.partition("; /")[0].partition("\n")[0]),
        environment=base.environment,
        migrate=base.migrate,
    )
    async with stack:
        drill = Drill(stack, seed=seed, names=[], seconds=seconds, say=say)
        over = asyncio.Event()
        running = asyncio.create_task(drill.run(over))
        rolling = asyncio.create_task(_roll(stack, base, this, say))
        await asyncio.wait({running, rolling}, return_when=asyncio.FIRST_COMPLETED)
        in_time = rolling.done()
        await rolling
        over.set()
        outcome = await running
        findings = await audit_installation(
            stack.audit_settings, KeptMails(record=stack.inbox.record)
        )
        audit = AuditReport(findings, findings.settings)
        return DrillReport(outcome, audit, "resend", renamed_recipients(stack.inbox.mails)), in_time


def main(arguments: Sequence[str]) -> int:
    """Run it; return 0 if every promise was kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.side_by_side", description=__doc__)
    parser.add_argument("tree", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=900, help="at most")
    given = parser.parse_args(arguments)
    started = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - started:7.1f} s  {text}\n")

    base = SourceTree("the old release", given.tree.resolve())
    with DrillFolder() as folder:
        report, in_time = asyncio.run(
            side_by_side(folder.path, base, seed=given.seed, seconds=given.seconds, say=say)
        )
        broken = [*report.broken]
        if not in_time:
            broken.append("the load ended before all processes were replaced: raise --seconds")
        folder.keep = bool(broken)
    document: dict[str, Any] = report.document()
    document["broken"] = broken
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
