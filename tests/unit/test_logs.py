from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import structlog

from outbox_server.shared.database.engine import create_engine
from outbox_server.shared.logs import configure_logging
from outbox_server.shared.settings import load_settings


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


def configured(log_format: Literal["json", "text"] = "json", level: str = "info") -> io.StringIO:
    out = io.StringIO()
    configure_logging(load_settings(log_format=log_format, log_level=level), out)
    return out


def documents(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_structlog_and_logging_both_write_one_json_document_per_line() -> None:
    out = configured()
    structlog.get_logger().info("batch accepted", rows=3)
    logging.getLogger("alembic").warning("two\nlines %s", 1)
    ours, theirs = documents(out)
    assert (ours["event"], ours["rows"], ours["level"]) == ("batch accepted", 3, "info")
    assert (theirs["event"], theirs["logger"]) == ("two\nlines 1", "alembic")
    assert theirs["time"].endswith("Z")


def test_ids_are_written_exactly_for_readers_whose_numbers_are_floats() -> None:
    out = configured()
    structlog.get_logger().info("x", job_id=3_766_484_992_000_000_001, senders=[2**53 + 1, 7], n=7)
    (line,) = documents(out)
    assert line["job_id"] == "3766484992000000001"
    assert (line["senders"], line["n"]) == (["9007199254740993", 7], 7)


def test_messages_below_the_level_are_not_written() -> None:
    out = configured(level="warning")
    structlog.get_logger().info("x")
    logging.getLogger("y").info("y")
    assert out.getvalue() == ""


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_secret_is_written(log_format: Literal["json", "text"]) -> None:
    out = configured(log_format)
    log = structlog.get_logger()
    log.info("x", smtp_password="hunter2", authorization="Bearer hunter2", api_key="hunter2")
    log.info("x", url="postgresql://outbox:hunter2@db/outbox")
    logging.getLogger("driver").error("cannot reach %s", "redis://:hunter2@queue:6379/0")
    secret = "hunter2"  # a trace shows source lines, but not this one
    try:
        fail(secret)
    except ValueError:
        log.exception("failed")
    text = out.getvalue()
    assert "hunter2" not in text
    assert "ValueError" in text
    assert "postgresql://outbox:[hidden]@db/outbox" in text


def test_the_console_format_is_human_readable() -> None:
    out = configured("text")
    structlog.get_logger().info("listening", port=5)
    assert "listening" in out.getvalue()
    assert "port=5" in out.getvalue()


def fail(password: str) -> None:
    raise ValueError(f"smtp://me:{password}@relay is gone")


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_mail_addresses_are_hidden_and_urls_are_not(log_format: Literal["json", "text"]) -> None:
    out = configured(log_format)
    structlog.get_logger().info("x", to="Ann Lee <ann.lee+x@example.org>, bob@ex.org", at=["c@d.e"])
    logging.getLogger("driver").error("no mailbox for dörte@exämple.org at smtp://relay@mail:25")
    text = out.getvalue()
    for part in ("ann", "example.org", "bob", "c@d.e", "dörte", "exämple"):
        assert part not in text, part
    assert text.count("[address]") == 4
    assert "smtp://relay@mail:25" in text


def test_only_the_first_line_of_an_error_message_is_written() -> None:
    out = configured()

    secret = "secret-row"  # a trace shows source lines, but not this one

    def insert() -> None:
        raise ValueError(f"the row violates a constraint\nDETAIL: (1, {secret})")

    try:
        try:
            insert()
        except ValueError as error:
            raise RuntimeError("y" * 500) from error
    except RuntimeError:
        structlog.get_logger().exception("failed")
    (line,) = documents(out)
    assert "builtins.ValueError: the row violates a constraint" in line["exception"]
    assert "in insert" in line["exception"]
    assert f"RuntimeError: {'y' * 200}\n" not in line["exception"]
    assert line["exception"].endswith("RuntimeError: " + "y" * 200)
    assert "secret-row" not in line["exception"]


def test_the_errors_of_a_group_are_all_written() -> None:
    out = configured()
    group = ExceptionGroup("two", [KeyError("first"), ValueError("second")])
    structlog.get_logger().error("failed", exc_info=group)
    (line,) = documents(out)
    assert "KeyError: 'first'" in line["exception"]
    assert "ValueError: second" in line["exception"]


async def test_the_connection_pool_logs_nothing_when_it_ends() -> None:
    out = configured()
    await create_engine(load_settings()).dispose()
    assert documents(out) == []
