"""Runs a drill: injects its faults into a stack, then audits the stack."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Self

from outbox_server.deploy.child import LocalServerError
from outbox_server.deploy.drill.report import DrillReport, renamed_recipients
from outbox_server.deploy.drill.run import Drill
from outbox_server.deploy.drill.stack import DrillStack
from outbox_server.deploy.record import KeptMails
from outbox_server.shared.audit.installation import audit_installation
from outbox_server.shared.audit.report import AuditReport


class DrillFolder:
    """A new folder for a drill. The end of the context removes it unless `keep` is set.

    It is also kept if a server did not start, because the error then names logs in it.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="outbox-drill-"))
        self.keep = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if not self.keep and not isinstance(error, LocalServerError):
            shutil.rmtree(self.path)


async def drill(
    stack: DrillStack, *, seed: int, names: list[str], seconds: float, say: Callable[[str], None]
) -> DrillReport:
    """Run the stack, inject the faults `names` for `seconds`, and audit it.

    Raises:
        LocalServerError: a server or service did not start.
    """
    async with stack:
        one = Drill(stack, seed=seed, names=names, seconds=seconds, say=say, limited=True)
        outcome = await one.run()
        mails = KeptMails(record=stack.inbox.record)
        findings = await audit_installation(stack.audit_settings, mails)
        return DrillReport(
            outcome,
            AuditReport(findings, findings.settings),
            stack.settings.uncertain_policy,
            renamed_recipients(stack.inbox.mails),
        )
