"""A whole drill: plays its faults on a stack, then audits what the stack did."""

from __future__ import annotations

from collections.abc import Callable

from deploy.drill.report import DrillReport, renamed_recipients
from deploy.drill.run import Drill
from deploy.drill.stack import DrillStack
from deploy.local.record import KeptMails
from shared.audit.installation import audit_installation
from shared.audit.report import AuditReport


async def drill(
    stack: DrillStack, *, seed: int, names: list[str], seconds: float, say: Callable[[str], None]
) -> DrillReport:
    """Run the stack, strike it with the faults `names` for so many seconds, and audit it.

    Raises:
        LocalServerError: a server or service did not start.
    """
    async with stack:
        outcome = await Drill(stack, seed=seed, names=names, seconds=seconds, say=say).run()
        mails = KeptMails(record=stack.inbox.record)
        findings = await audit_installation(stack.audit_settings, mails)
        return DrillReport(
            outcome,
            AuditReport(findings, stack.audit_settings),
            stack.settings.uncertain_policy,
            renamed_recipients(stack.inbox.mails),
        )
