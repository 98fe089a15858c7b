"""Prints results on stdout, as a table or one JSON document, and all else on stderr."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Final

import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from outbox_server.cli.terminal import note, printable
from outbox_server.shared.durations import format_duration
from outbox_server.shared.smtp.reply_text import describe_reply

# A pipe has no width: nothing is wrapped or cut in it.
_PIPE_WIDTH: Final = 10_000
# A cooldown is shown in one cell, as a sentence.
_COOLDOWN: Final = "outbox.v1.Cooldown"
# Messages that are shown as a pair: the separator, and the text of a first field that is unset.
_PAIRS: Final = {
    "outbox.v1.MailHeader": (": ", ""),
    "outbox.v1.ReplyClassCount": ("=", "no reply"),
}
_NOT_PLAIN: Final = re.compile(r"[^\x20-\x7e\n]")
# Numbers from here on are shown without decimals.
_NO_DECIMALS_FROM: Final = 100


class OutputFormat(StrEnum):
    """The format of the result on stdout."""

    TABLE = "table"
    JSON = "json"


Output = Annotated[
    OutputFormat,
    typer.Option(
        "--output",
        "-o",
        help="With json, stdout holds one JSON document; an error is one on stderr.",
    ),
]


def stdout() -> Console:
    """Return a console on stdout that does not interpret markup."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def stderr() -> Console:
    """Return a console on stderr that does not interpret markup."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def print_json(document: Any) -> None:
    """Print one document on stdout."""
    sys.stdout.write(_json(document, indent=2) + "\n")
    sys.stdout.flush()


def print_json_line(document: Any) -> None:
    """Print one document of a stream, on a line of its own, on stdout."""
    sys.stdout.write(_json(document) + "\n")
    sys.stdout.flush()


def _json(document: Any, indent: int | None = None) -> str:
    """Return JSON with every character escaped that could control a terminal."""
    text = json.dumps(document, ensure_ascii=False, indent=indent)
    return _NOT_PLAIN.sub(lambda found: _escaped(found[0]), text)


def _escaped(char: str) -> str:
    # The escape of json.dumps, without its quotes.
    return char if char.isprintable() else json.dumps(char)[1:-1]


def to_document(message: Message) -> dict[str, Any]:
    """Return a message as proto JSON: original field names, with zeros and empty lists."""
    document: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return document


def show(
    message: Message, output: OutputFormat, *, without: Sequence[str] = (), first: str = ""
) -> None:
    """Print one message. The table has a row for each set field, except those in `without`.

    `first` names the field that answers the user's question.
    """
    if output is OutputFormat.JSON:
        print_json(to_document(message))
        return
    rows = sorted(_fields(message, without), key=lambda row: row[0] != first)
    if rows:
        print_rows(("field", "value"), rows)


def show_list(
    response: Message, field: str, columns: Sequence[str], output: OutputFormat, *, what: str
) -> None:
    """Print one page of a list. `columns` are paths in the items, such as `counts.sent_count`."""
    if output is OutputFormat.JSON:
        print_json(to_document(response))
        return
    items = getattr(response, field)
    if items:
        names = [path.rpartition(".")[2] for path in columns]
        print_rows(names, ([value_at(item, path) for path in columns] for item in items))
    else:
        note(f"no {what}")
    more = getattr(response, "next_page_token", "")
    if more:
        note(f"more results: use --all, or --page-token {more}")


def print_rows(names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    stdout().print(table)


def value_at(message: Message, path: str) -> str:
    """Return the field at a path as a table shows it, or an empty text if it is unset."""
    *parents, last = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
    return _value(message, message.DESCRIPTOR.fields_by_name[last])


def _fields(message: Message, without: Sequence[str], prefix: str = "") -> Iterable[list[str]]:
    for field in message.DESCRIPTOR.fields:
        if field.name in without:
            continue
        if _is_plain_message(field):
            if message.HasField(field.name):
                yield from _fields(getattr(message, field.name), (), f"{prefix}{field.name}.")
            continue
        value = _value(message, field)
        if value:
            yield [f"{prefix}{field.name}", value]


def _is_plain_message(field: Any) -> bool:
    return (
        field.message_type is not None
        and not field.is_repeated
        and field.message_type.full_name
        not in ("google.protobuf.Timestamp", "google.protobuf.Duration", _COOLDOWN)
    )


def _is_map(field: Any) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _value(message: Message, field: Any) -> str:
    value = getattr(message, field.name)
    if _is_map(field):
        inner = field.message_type.fields_by_name["value"]
        return ", ".join(f"{_plain(key)}={_scalar(value[key], inner)}" for key in sorted(value))
    if field.is_repeated:
        return ", ".join(_scalar(item, field) for item in value)
    if field.has_presence and not message.HasField(field.name):
        return ""
    return _scalar(value, field)


def _scalar(value: Any, field: Any) -> str:
    if isinstance(value, Timestamp):
        return _time(value)
    if isinstance(value, Duration):
        return _duration(value.ToTimedelta())
    if isinstance(value, Message):
        return _message(value)
    if field.enum_type is not None:
        return _enum_name(value, field)
    return _plain(value)


def _message(value: Message) -> str:
    kind = value.DESCRIPTOR.full_name
    if kind == _COOLDOWN:
        return _cooldown(value)
    if kind in _PAIRS:
        separator, unset = _PAIRS[kind]
        first, second = value.DESCRIPTOR.fields
        return f"{_value(value, first) or unset}{separator}{_value(value, second)}"
    return ", ".join(f"{name}={text}" for name, text in _fields(value, ()))


def _time(stamp: Timestamp) -> str:
    return utc_text(stamp.ToDatetime(UTC))


def utc_text(time: datetime) -> str:
    """Return a time as all output shows it: in UTC, to the second."""
    return time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def reply_of(cooldown: Any) -> str:
    """Return the reply that caused a cooldown, as one line without control characters."""
    code = cooldown.smtp_code if cooldown.HasField("smtp_code") else None
    return printable(describe_reply(code, cooldown.enhanced_code, cooldown.message))


def _cooldown(cooldown: Any) -> str:
    since, probe = _time(cooldown.start_time), _time(cooldown.next_probe_time)
    return f"since {since}: {reply_of(cooldown)}; next probe {probe}"


def _plain(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= _NO_DECIMALS_FROM else f"{value:.3g}"
    return printable(str(value))


def _duration(value: timedelta) -> str:
    """Return a duration for people: 250ms, 2s, 1m30s, 33m18s."""
    if value < timedelta(minutes=1):
        return format_duration(value)
    seconds = round(value.total_seconds())
    parts = ((seconds // 3_600, "h"), (seconds // 60 % 60, "m"), (seconds % 60, "s"))
    return "".join(f"{number}{unit}" for number, unit in parts if number)


def _enum_name(value: int, field: Any) -> str:
    names = field.enum_type.values_by_number
    if not value:
        return ""
    # EMAIL_JOB_STATE_SENT becomes SENT: the zero value shows the prefix of all values.
    prefix = names[0].name.removesuffix("UNSPECIFIED")
    return names[value].name.removeprefix(prefix) if value in names else str(value)
