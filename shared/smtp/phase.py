"""The steps of an SMTP session."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """The step of a session that a reply answers."""

    CONNECT = "CONNECT"  # the greeting
    EHLO = "EHLO"
    STARTTLS = "STARTTLS"
    AUTH = "AUTH"
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"  # the reply to the command: 354, or a refusal
    BODY = "BODY"  # the reply to the final dot
