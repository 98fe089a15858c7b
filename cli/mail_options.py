"""Options of commands that write mails: templates, headers and labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from outbox.v1.batch_pb2 import MailHeader

from outbox_server.cli.options import text_or_file


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateOptions:
    """The subject and the content of mails."""

    subject: Annotated[
        str | None,
        typer.Option("--subject", help="Subject, a Liquid template: 'Hello {{ first_name }}'."),
    ] = None
    body: Annotated[str | None, typer.Option("--body", help="Plain text, a Liquid template.")] = (
        None
    )
    body_file: Annotated[
        Path | None, typer.Option("--body-file", help="File containing the --body.")
    ] = None
    html: Annotated[str | None, typer.Option("--html", help="HTML, a Liquid template.")] = None
    html_file: Annotated[
        Path | None, typer.Option("--html-file", help="File containing the --html.")
    ] = None

    def templates(self) -> dict[str, Any]:
        """Return the fields `subject`, `body` and `html`; None means that an option is not given.

        Raises:
            typer.BadParameter: a text and its file are both given, or a file cannot be read.
        """
        return {
            "subject": self.subject,
            "body": text_or_file(self.body, self.body_file, "--body, --body-file"),
            "html": text_or_file(self.html, self.html_file, "--html, --html-file"),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderOptions:
    """The headers of mails except the subject."""

    reply_to: Annotated[
        str | None,
        typer.Option(
            "--reply-to",
            metavar="ADDRESS",
            help="Where replies go: an address, or 'Name <address>'; may be a template.",
        ),
    ] = None
    header: Annotated[
        list[str] | None,
        typer.Option(
            "--header",
            metavar="'NAME: VALUE'",
            help="Header of the mails; the value may be a template. Repeatable.",
        ),
    ] = None
    name_column: Annotated[
        str | None,
        typer.Option("--name-column", metavar="NAME", help="Column of the recipients' names."),
    ] = None

    def headers(self) -> dict[str, Any]:
        """Return the fields `reply_to`, `headers` and `name_column`.

        Raises:
            typer.BadParameter: a `--header` is not `Name: value`.
        """
        return {
            "reply_to": self.reply_to or "",
            "headers": read_headers(self.header or ()),
            "name_column": self.name_column or "",
        }


def read_headers(texts: Iterable[str]) -> list[MailHeader]:
    """Return headers that are written as in a mail: `Name: value`.

    Raises:
        typer.BadParameter: there is no colon.
    """
    headers = []
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon:
            raise typer.BadParameter(f"must be 'Name: value' (got {text!r})", param_hint="--header")
        headers.append(MailHeader(name=name.strip(), value=value.strip()))
    return headers


def read_labels(texts: Iterable[str]) -> dict[str, str]:
    """Return labels that are written as `key=value`.

    Raises:
        typer.BadParameter: there is no equals sign, or one key is there twice.
    """
    labels: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"must be key=value (got {text!r})", param_hint="--label")
        if key in labels:
            raise typer.BadParameter(f"{key!r} is there twice", param_hint="--label")
        labels[key] = value
    return labels
