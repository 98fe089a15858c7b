"""Logging to stderr without secrets and mail: a JSON document per line, or text for people.

A line has `job_id`, `batch_id`, `request_id` and `trace_id` where they are known: the task that
works for the job or the call binds them by `structlog.contextvars`. A send has no task, so its log
lines are given the ids.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Final, TextIO

import structlog

from outbox_server.shared.log_content import brief_trace, hide_addresses, hide_server_texts
from outbox_server.shared.settings import Settings

_HIDDEN: Final = "[hidden]"
# The values of these fields are never written.
_SECRET_FIELD: Final = re.compile(
    r"password|passwd|secret|token|authorization|api_?key|encryption_?key", re.IGNORECASE
)
# Numbers up to this one are exact in JavaScript, jq and others that use floats for all numbers.
_MOST_EXACT: Final = 2**53
# The password in a URL, which may be in a setting, a driver's message or a trace.
_URL_PASSWORD: Final = re.compile(r"(://[^\s:/@\"']*:)[^\s@\"']+(?=@)")


def configure_logging(settings: Settings, stream: TextIO | None = None) -> None:
    """Set up structlog and the standard library's logging; called once per process.

    Both write to `stream` (default: stderr), by OUTBOX_LOG_LEVEL and OUTBOX_LOG_FORMAT.
    """
    out = stream or sys.stderr
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    prepare: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        # In both formats, traces omit the locals of their frames: locals contain secrets.
        structlog.processors.format_exc_info
        if settings.log_addresses
        else structlog.processors.ExceptionRenderer(brief_trace),
        hide_secret_fields,
        write_large_numbers_as_text,
    ]
    finish: list[Any] = [hide_url_passwords]
    if not settings.log_addresses:
        prepare.append(hide_server_texts)
        finish.append(hide_addresses)
    renderer: Any
    if settings.log_format == "json":
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=out.isatty(),
            timestamp_key="time",
            exception_formatter=structlog.dev.plain_traceback,
        )
    structlog.configure(
        processors=[*prepare, renderer, *finish],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *prepare],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                renderer,
                *finish,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # At level debug, libraries log their own details, which may contain secrets.
    root.setLevel(max(level, logging.INFO))
    logging.captureWarnings(capture=True)


def hide_secret_fields(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Hide the value of every field whose name indicates a secret."""
    for name in event:
        if _SECRET_FIELD.search(name):
            event[name] = _HIDDEN
    return event


def write_large_numbers_as_text(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Write numbers above 2^53, such as ids, as text: most readers of JSON would round them."""
    for name, value in event.items():
        if isinstance(value, list):
            event[name] = [_exact(each) for each in value]
        else:
            event[name] = _exact(value)
    return event


def _exact(value: Any) -> Any:
    return str(value) if isinstance(value, int) and abs(value) > _MOST_EXACT else value


def hide_url_passwords(_logger: object, _method: str, line: Any) -> str:
    """Hide the password of every URL in the rendered `line`."""
    return _URL_PASSWORD.sub(rf"\1{_HIDDEN}", line) if "://" in line else line
