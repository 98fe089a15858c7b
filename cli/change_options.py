"""The options of all commands that change something: they fill the fields of the same names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

import typer
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

_PANEL: Final = "Change"
_REASON: Final = "Why the change is made, for the audit log."
_Identity = Annotated[
    str,
    typer.Option(
        "--identity",
        metavar="NAME",
        help="Who asks for the change, for the audit log.",
        rich_help_panel=_PANEL,
    ),
]
_Reason = Annotated[
    str,
    typer.Option(
        "--reason", "--change-reason", metavar="TEXT", help=_REASON, rich_help_panel=_PANEL
    ),
]
# Used by commands whose `--reason` has another meaning.
_ChangeReason = Annotated[
    str, typer.Option("--change-reason", metavar="TEXT", help=_REASON, rich_help_panel=_PANEL)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditOptions:
    """The values for the audit log, of a command whose `request_id` is an option of the batch."""

    identity: _Identity = ""
    change_reason: _Reason = ""

    def of(self, request: M) -> M:
        """Return `request` with the values of the options."""
        filled: Any = request
        filled.identity = self.identity
        filled.reason = self.change_reason
        return request


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeOptions:
    """The id that makes a change safe to repeat, and the values for the audit log."""

    request_id: Annotated[
        str,
        typer.Option(
            "--request-id",
            metavar="ID",
            help="Makes it safe to run the command again: the same id changes nothing more.",
            rich_help_panel=_PANEL,
        ),
    ] = ""
    identity: _Identity = ""
    change_reason: _Reason = ""

    def of(self, request: M, part: int = 0) -> M:
        """Return `request` with the values of the options.

        A command that calls a method repeatedly numbers its calls with `part`, from 0: each call
        needs an id of its own, or it would get the answer of the first one.
        """
        filled: Any = request
        numbered = bool(self.request_id and part)
        filled.request_id = f"{self.request_id}-{part}" if numbered else self.request_id
        filled.identity = self.identity
        filled.reason = self.change_reason
        etag = getattr(self, "etag", "")
        # UpdateSender has it in the sender.
        if etag and "etag" in request.DESCRIPTOR.fields_by_name:
            filled.etag = etag
        return request


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasonedChangeOptions(ChangeOptions):
    """The same for a command whose `--reason` has another meaning."""

    change_reason: _ChangeReason = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardedChangeOptions(ChangeOptions):
    """The same for a resource with an `etag`."""

    etag: Annotated[
        str,
        typer.Option(
            "--etag",
            metavar="ETAG",
            help="Change it only if it still has this etag.",
            rich_help_panel=_PANEL,
        ),
    ] = ""
