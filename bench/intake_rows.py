"""`python -m bench.intake_rows`: how many rows per second are read, checked and rendered.

It reads a CSV as the scheduler does, with the template workers and without PostgreSQL. The speed is
that of processor time, of this process and the workers together, so that other programs on the
machine do not count. The first number is that of the clock.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import Final, TypeVar

from outbox_server.shared.intake.batch_options import BatchOptions
from outbox_server.shared.intake.blocks import BlockReader
from outbox_server.shared.intake.payloads import CsvPayload, WholeFile
from outbox_server.shared.settings import load_settings
from outbox_server.shared.templates.remote import TemplateParser

T = TypeVar("T")

ROWS: Final = 100_000
_RICH: Final = (
    "Dear {{ name | upcase | truncate: 20 }}, {% if points >= 100 %}gold{% else %}silver"
    "{% endif %}, {{ order | append: '-' | append: points }} of {{ now | date: '%Y' }}"
)
_TEMPLATES: Final = {
    "only inserts columns": ("Order {{ order }}", "Dear {{ name | default: 'you' }}, thanks."),
    "a condition": (
        "Order {{ order }}",
        "Dear {{ name }}, {% if points > 100 %}you are gold{% else %}thanks{% endif %}.",
    ),
    "filters and a condition": (
        "{{ name | capitalize }}: order {{ order }}",
        _RICH,
    ),
    "the same, rendered for each row": (
        "{{ name | capitalize }}: order {{ order }}",
        _RICH + "{{ name.size }}",
    ),
    "a loop, rendered for each row": (
        "Order {{ order }}",
        "Dear {{ name }}{% assign l = name | split: ' ' %}{% for i in l %}, {{ i }}{% endfor %}.",
    ),
}


class _CountingParser(TemplateParser):
    """Counts the processor time of the workers."""

    worker_seconds = 0.0

    async def try_to_run(
        self, user: str, *job: object, decode: Callable[[object], T]
    ) -> tuple[T, float]:
        found, seconds = await super().try_to_run(user, *job, decode=decode)
        self.worker_seconds += seconds
        return found, seconds


async def measure(rows: int) -> dict[str, tuple[float, float]]:
    """Return the rows per second by the kind of template: of the clock, and of processor time."""
    lines = (f"user{n}@example.com,Ann {n},{n},{n % 200}" for n in range(rows))
    csv = ("email,name,order,points\n" + "\n".join(lines)).encode()
    settings = load_settings()
    parser = _CountingParser(settings)
    found = {}
    try:
        for kind, (subject, body) in _TEMPLATES.items():
            options = BatchOptions("request", 1, subject=subject, body=body, html=None)
            template = await parser.parse("user", subject, body, None)
            reader = BlockReader(CsvPayload(WholeFile(csv)), options, settings.max_message_bytes)
            reader.use(template, template.renderer)
            with closing(reader):
                began, used = time.perf_counter(), time.process_time()
                parser.worker_seconds = 0.0
                count = 0
                while (block := await asyncio.to_thread(reader.next)) is not None:
                    count += len(block.rows)
                used = time.process_time() - used + parser.worker_seconds
                found[kind] = count / (time.perf_counter() - began), count / used
            if count != rows:
                raise SystemExit(f"{kind}: {count} of {rows} rows")
    finally:
        await parser.close()
    return found


def main() -> None:
    """Measure and print."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    for kind, (clock, processor) in asyncio.run(measure(rows)).items():
        print(f"{kind}: {clock:,.0f} rows/s, {processor:,.0f} per second of processor time")


if __name__ == "__main__":
    main()
