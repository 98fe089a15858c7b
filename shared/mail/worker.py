"""The program of the worker processes: builds mails, and checks and renders templates.

`python -m outbox_server.shared.mail.worker BUDGET MEMORY`; see `shared.templates.worker`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from outbox_server.shared.mail.message import Message, MessageBuilder, MessageError
from outbox_server.shared.templates.batch import RenderError, decode_variables, longest_of
from outbox_server.shared.templates.head import NO_HEAD, HeadTexts
from outbox_server.shared.templates.wire import StartBudget
from outbox_server.shared.templates.worker import (
    PARSING_BUDGETS,
    TEMPLATE_JOBS,
    Job,
    TemplateCache,
    serve,
)


class MailRequest(NamedTuple):
    """The parts of a mail. Decoding turns tuples into lists."""

    subject: str | None
    body: str | None
    html: str | None
    sender_email: str
    display_name: str
    max_bytes: int
    variable_names: Sequence[str]
    variables: str | None
    recipient: str
    message_id: str
    # Unix time.
    date: float
    test: bool = False
    head: HeadTexts = NO_HEAD


def _mail_of(start_budget: StartBudget) -> Job:
    templates = TemplateCache()

    def build(*arguments: Any) -> object:
        it = MailRequest(*arguments)
        # Templates that were accepted must not fail because they are parsed more slowly here.
        start_budget(PARSING_BUDGETS)
        head = HeadTexts.from_wire(it.head)
        longest = longest_of(it.subject, it.body, it.html, head)
        sources = {"subject": it.subject, "body": it.body, "html": it.html}
        template = templates.batch(sources, head, longest)
        start_budget(1.0)
        try:
            builder = MessageBuilder(
                it.sender_email,
                it.display_name,
                template,
                max_bytes=it.max_bytes,
                test=it.test,
            )
            values = decode_variables(it.variable_names, it.variables)
            date = datetime.fromtimestamp(it.date, UTC)
            mail = builder.build(it.recipient, values, it.message_id, date)
        except MessageError as error:
            raise RenderError(error.reason, error.message) from None
        return [mail.data, mail.recipient, mail.needs_smtputf8]

    return build


def message_of(value: object) -> Message:
    """Return the mail that a worker built.

    Raises:
        ValueError: it built none.
    """
    match value:
        case [bytes(data), str(recipient), bool(needs_smtputf8)]:
            return Message(data, recipient, needs_smtputf8)
    raise ValueError("not a mail")


if __name__ == "__main__":
    sys.exit(serve({**TEMPLATE_JOBS, "build": _mail_of}))
