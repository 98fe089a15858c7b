"""The servers of the bench: what they measure would be wrong if they did less than they say."""

from __future__ import annotations

import smtplib
import ssl
import sys
import time
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path

import pytest

from bench.world import program
from outbox_server.deploy.certificates import self_signed


@pytest.fixture(scope="module")
def sink() -> Iterator[int]:
    with program(sys.executable, "-m", "bench.sink") as (_, port):
        yield port


def message(body: str) -> EmailMessage:
    found = EmailMessage()
    found["From"], found["To"], found["Subject"] = "a@example.com", "b@example.net", "Hello"
    found.set_content(body)
    return found


def test_the_sink_takes_mails_one_after_the_other(sink: int) -> None:
    with smtplib.SMTP("127.0.0.1", sink, timeout=10) as client:
        for size in (1, 100_000):
            # Lines that begin with a dot, which is doubled.
            assert client.send_message(message(".\n" * size)) == {}


def test_the_sink_takes_pipelined_commands(sink: int) -> None:
    with smtplib.SMTP("127.0.0.1", sink, timeout=10) as client:
        client.ehlo()
        client.send("MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n")
        assert [client.getreply()[0] for _ in range(3)] == [250, 250, 354]
        # The end of the body comes in parts.
        for part in ("Hello\r", "\n.", "\r\nQUIT\r\n"):
            client.send(part)
        assert [client.getreply()[0] for _ in range(2)] == [250, 221]


def test_the_sink_of_accounts_refuses_mail_without_tls_and_a_login(tmp_path: Path) -> None:
    certificate = self_signed(tmp_path)
    argv = ("--auth", "--certificate", str(certificate.public), "--key", str(certificate.private))
    with (
        program(sys.executable, "-m", "bench.sink", *argv) as (_, port),
        smtplib.SMTP("127.0.0.1", port, timeout=10) as client,
    ):
        client.ehlo()
        assert not client.has_extn("auth")
        with pytest.raises(smtplib.SMTPSenderRefused):
            client.send_message(message("Hello"))
        client.starttls(context=ssl.create_default_context(cafile=str(certificate.public)))
        with pytest.raises(smtplib.SMTPSenderRefused):
            client.send_message(message("Hello"))
        client.login("ann", "secret")
        assert client.send_message(message("Hello")) == {}


def test_the_proxy_makes_a_server_as_far_away_as_it_is_told(sink: int) -> None:
    argv = (sys.executable, "-m", "bench.delaying_proxy", str(sink), "100")
    with program(*argv) as (_, port), smtplib.SMTP("127.0.0.1", port, timeout=10) as client:
        client.ehlo()
        began = time.monotonic()
        for _ in range(3):
            assert client.noop()[0] == 250
        # Never less than three round trips, but for the whole milliseconds of uvloop's clock and
        # timers, in each direction. More only on a machine with other work.
        assert time.monotonic() - began >= 0.29
