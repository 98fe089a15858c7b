"""Options that several commands share, and the parsers of durations, times, enums and texts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from outbox_server.cli.lazy import CommandFailed
from outbox_server.shared.durations import parse_duration

User = Annotated[
    str,
    typer.Option("--user", metavar="ID", help="Owner; required with a service or operator key."),
]


def one_user(argument: str, option: str) -> str:
    """Return the user of a command that takes it as an argument or with `--user`.

    Raises:
        typer.BadParameter: they differ.
    """
    if argument and option and argument != option:
        raise typer.BadParameter(f"{argument!r} and --user {option!r} are different users")
    return argument or option


@dataclass(frozen=True, slots=True, kw_only=True)
class Paging:
    """Which page of a list to fetch, or all of them."""

    page_size: Annotated[
        int,
        typer.Option(
            "--page-size",
            min=0,
            max=1000,
            show_default=False,
            help="Results per page (default 50).",
        ),
    ] = 0
    page_token: Annotated[
        str, typer.Option("--page-token", help="Token from the previous page.")
    ] = ""
    everything: Annotated[bool, typer.Option("--all", help="Fetch all pages.")] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtering:
    """Which results of a list to fetch, and in which order."""

    filter: Annotated[
        str,
        typer.Option(
            "--filter",
            metavar="FILTER",
            help="Only what matches, such as 'FIELD = VALUE AND FIELD > VALUE'; docs/filters.md "
            "has the fields of each list.",
        ),
    ] = ""
    order_by: Annotated[
        str,
        typer.Option(
            "--order-by", metavar="FIELD", help="The order; docs/filters.md has those of each list."
        ),
    ] = ""


def read_duration(text: str) -> timedelta:
    """Parse the duration of an option.

    Raises:
        typer.BadParameter: the text is not a duration.
    """
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def read_time(text: str) -> datetime:
    """Parse a time in RFC 3339, `now` or `in 10m`.

    Raises:
        typer.BadParameter: the text is not a time, or has no UTC offset.
    """
    wanted = text.strip()
    if wanted.lower() == "now":
        return datetime.now(UTC)
    if wanted.lower().startswith("in "):
        later = read_duration(wanted[3:])
        try:
            return datetime.now(UTC) + later
        except OverflowError:
            raise typer.BadParameter(f"{wanted} is after the year 9999") from None
    try:
        time = datetime.fromisoformat(wanted)
    except ValueError:
        raise typer.BadParameter(
            f"{wanted!r} is not a time; use 2026-12-24T18:00:00+01:00, `in 10m` or `now`"
        ) from None
    if time.tzinfo is None:
        raise typer.BadParameter(
            f"{wanted} has no UTC offset; add Z for UTC or, for example, +01:00"
        )
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise typer.BadParameter(f"{wanted} is outside the years 1 to 9999 in UTC") from None


Until = Annotated[
    datetime | None,
    typer.Option(
        "--until",
        "--pause-end-time",
        parser=read_time,
        metavar="TIME",
        help="When the pause ends by itself, such as 'in 2h' (default: only resume ends it).",
    ),
]


def time_option(flag: str, description: str) -> Any:
    """Return an option with a time, as `read_time` reads it."""
    return typer.Option(flag, parser=read_time, metavar="TIME", help=description)


def duration_option(flag: str, description: str) -> Any:
    """Return an option with a duration, as `read_duration` reads it."""
    return typer.Option(flag, parser=read_duration, metavar="DURATION", help=description)


EndTime = Annotated[datetime | None, time_option("--end-time", "End, exclusive (default: now).")]
OfSender = Annotated[str, typer.Option("--sender", metavar="ID", help="Only jobs of this sender.")]
OfBatch = Annotated[str, typer.Option("--batch", metavar="ID", help="Only jobs of this batch.")]


def read_int32(text: str) -> int:
    """Parse a whole number that fits in an int32 field. The server checks its bounds.

    Raises:
        typer.BadParameter: the text is not a whole number, or does not fit.
    """
    return _read_whole(text, 31)


def read_int64(text: str) -> int:
    """Parse a whole number like `read_int32`, for an int64 field."""
    return _read_whole(text, 63)


def _read_whole(text: str, bits: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a whole number") from None
    if not -(2**bits) <= number < 2**bits:
        raise typer.BadParameter(f"{number} is too {'large' if number > 0 else 'small'}")
    return number


# How a CSV is read.
EmailColumn = Annotated[
    str,
    typer.Option(
        "--email-column",
        metavar="NAME",
        help="Column of the addresses, as the header writes it (default: found by its name).",
    ),
]
SkipLines = Annotated[
    int,
    typer.Option(
        "--skip-lines",
        parser=read_int32,
        metavar="N",
        help="Lines before the header, such as a title.",
    ),
]


def to_duration(value: timedelta | None) -> Duration | None:
    """Convert a value to a message field. None means unset."""
    if value is None:
        return None
    duration = Duration()
    duration.FromTimedelta(value)
    return duration


def to_timestamp(value: datetime | None) -> Timestamp | None:
    """Convert a value to a message field. None means unset."""
    if value is None:
        return None
    timestamp = Timestamp()
    timestamp.FromDatetime(value)
    return timestamp


def enum_reader(enum: Any, prefix: str) -> Callable[[str], int]:
    """Return a parser for the values of a protobuf enum: without their prefix, in any case."""
    names = [name.removeprefix(prefix) for name in enum.keys()[1:]]

    def read(text: str) -> int:
        name = text.strip().upper().replace("-", "_")
        if name not in names:
            known = ", ".join(one.lower().replace("_", "-") for one in names)
            raise typer.BadParameter(f"{text!r} is not one of {known}")
        value: int = enum.Value(prefix + name)
        return value

    # Typer shows this name as the option's type.
    read.__name__ = "|".join(one.lower().replace("_", "-") for one in names)
    return read


def open_input(file: Path) -> AbstractContextManager[BinaryIO]:
    """Open a file to read; `-` is stdin, which stays open.

    Raises:
        CommandFailed: the file cannot be read.
    """
    try:
        return nullcontext(sys.stdin.buffer) if str(file) == "-" else file.open("rb")
    except OSError as error:
        raise CommandFailed(f"{file} cannot be read: {error.strerror}") from None


def text_or_file(text: str | None, file: Path | None, flags: str) -> str | None:
    """Return the text or the file's content, or None if neither was given. `flags` names both.

    Raises:
        typer.BadParameter: both were given, or the file cannot be read as UTF-8.
    """
    if file is None:
        return text
    if text is not None:
        raise typer.BadParameter(f"{flags}: give only one of them")
    try:
        if str(file) == "-":
            return sys.stdin.read()
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{file} is not UTF-8 text") from None
