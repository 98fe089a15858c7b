"""Options of `outbox schedule` for the headers of mails, and for labels."""

from __future__ import annotations

from collections.abc import Iterable

import typer
from outbox.v1.batch_pb2 import MailHeader


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
