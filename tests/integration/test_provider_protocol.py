"""SMTP of a simulated provider over a bare socket: order, limits, TLS and AUTH."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from outbox_server.deploy.certificates import Certificate, self_signed, server_context
from outbox_server.deploy.mail_store import MailStore
from outbox_server.deploy.providers.catalog import PLAIN
from outbox_server.deploy.providers.google import GMAIL
from outbox_server.deploy.providers.microsoft import EXCHANGE_ONLINE
from outbox_server.deploy.providers.profile import MINUTE_S, Profile, Rate, RefusingReply
from outbox_server.deploy.providers.sasl import Account
from outbox_server.deploy.providers.server import Provider
from outbox_server.deploy.providers.tally import Ending, Tally
from outbox_server.deploy.providers.wire import LONGEST_COMMAND, LineTooLongError, Wire
from outbox_server.deploy.record import read_record
from outbox_server.shared.smtp.replies import Phase
from tests.eventually import eventually
from tests.provider_clients import (
    ACCOUNTS,
    PASSWORD,
    TOKEN,
    USER,
    BareClient,
    bare_client,
    client_context,
)
from tests.smtp_servers import plain_login


@pytest.fixture
async def plain() -> AsyncIterator[Provider]:
    async with Provider(PLAIN) as provider:
        yield provider


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


async def greeted(client: BareClient) -> str:
    await client.reply()
    return await client.say("EHLO client.x.test")


async def test_pipelined_commands_are_answered_in_order_with_the_refused_one_in_its_place(
    plain: Provider,
) -> None:
    async with bare_client(plain) as client:
        assert "\n250-PIPELINING\n" in await greeted(client)
        client.write(
            *("MAIL FROM:<a@x.test>", "RCPT TO:<unknown@y.test>", "RCPT TO:<ann@y.test>", "DATA")
        )
        codes = [reply[:9] for reply in await client.replies(4)]
        assert codes == ["250 2.1.0", "550 5.1.1", "250 2.1.5", "354 End d"]
        client.write(
            *("Message-ID: <1@x.test>", "", "Hi", "."),
            *("MAIL FROM:<a@x.test>", "RCPT TO:<ben@y.test>", "DATA"),
        )
        codes = [reply[:9] for reply in await client.replies(4)]
        assert codes == ["250 2.0.0", "250 2.1.0", "250 2.1.5", "354 End d"]
        client.write("Message-ID: <2@x.test>", "", "Hi", ".", "QUIT")
        assert [reply[:3] for reply in await client.replies(2)] == ["250", "221"]
        assert await client.reply() == ""
    assert [(one.message_id, one.recipients) for one in plain.tally.mails] == [
        ("<1@x.test>", ("ann@y.test",)),
        ("<2@x.test>", ("ben@y.test",)),
    ]


@pytest.mark.parametrize("answers_354", [False, True])
async def test_pipelined_data_without_a_recipient_delivers_nothing(answers_354: bool) -> None:
    profile = dataclasses.replace(PLAIN, data_without_recipients=answers_354)
    async with Provider(profile) as provider, bare_client(provider) as client:
        await greeted(client)
        client.write("MAIL FROM:<a@x.test>", "RCPT TO:<unknown@y.test>", "DATA")
        codes = [reply[:3] for reply in await client.replies(3)]
        assert codes == ["250", "550", "354" if answers_354 else "554"]
        if answers_354:
            assert (await client.say(".")).startswith("554 5.5.1")
        assert (await client.say("RSET")).startswith("250")
        assert provider.tally.accepted == 0
        assert provider.tally.refused_for_good == 1


async def test_replies_come_in_order_although_the_first_mail_is_answered_late() -> None:
    async with Provider(dataclasses.replace(PLAIN, reply_delay_s=0.2)) as provider:
        async with bare_client(provider) as client:
            await greeted(client)
            client.write("MAIL FROM:<a@x.test>", "RCPT TO:<ann@y.test>", "DATA", "", "Hi", ".")
            client.write("NOOP", "QUIT")
            # The mail is already accepted while the client still waits.
            await eventually(lambda: provider.tally.accepted == 1)
            replies = await client.replies(6)
        assert [reply[:9] for reply in replies] == [
            *("250 2.1.0", "250 2.1.5", "354 End d", "250 2.0.0", "250 2.0.0", "221 2.0.0")
        ]


async def test_dots_are_unstuffed_and_the_body_is_stored_as_it_was_written(tmp_path: Path) -> None:
    store = MailStore(tmp_path / "maildir")
    async with Provider(PLAIN, store=store) as provider, bare_client(provider) as client:
        await greeted(client)
        client.write("MAIL FROM:<a@x.test>", "RCPT TO:<ann@y.test>", "DATA")
        await client.replies(3)
        lines = ("Message-ID: <1@x.test>", "", "..", "...x", "..leading", "in.side", "a\n.\nb", ".")
        # The pieces split the end marker in two.
        data = "".join(f"{line}\r\n" for line in lines).encode()
        for piece in (data[:-3], data[-3:-1], data[-1:]):
            client.writer.write(piece)
            await client.writer.drain()
            await asyncio.sleep(0)
        assert (await client.reply()).startswith("250")
        for body in ("", "x\r\n"):
            client.write("MAIL FROM:<a@x.test>", "RCPT TO:<ann@y.test>", "DATA")
            await client.replies(3)
            client.writer.write(f"{body}.\r\n".encode())
            assert (await client.reply()).startswith("250")
    stored = [(store.maildir / "new" / one.file).read_bytes() for one in read_record(store.record)]
    assert stored == [
        b"Message-ID: <1@x.test>\r\n\r\n.\r\n..x\r\n.leading\r\nin.side\r\na\n.\nb\r\n",
        b"",
        b"x\r\n",
    ]
    assert [one.bytes for one in provider.tally.mails] == [len(one) for one in stored]


async def test_a_mail_above_the_size_limit_is_refused_before_and_after_its_body() -> None:
    async with Provider(dataclasses.replace(PLAIN, size=1000)) as provider:
        async with bare_client(provider) as client:
            assert "SIZE 1000" in await greeted(client)
            refusal = "552 5.3.4 Message size exceeds fixed limit"
            assert await client.say("MAIL FROM:<a@x.test> SIZE=1001") == refusal
            assert (await client.say("MAIL FROM:<a@x.test> SIZE=1000")).startswith("250")
            for number, length in enumerate((999, 998), 1):
                assert (await client.say("RCPT TO:<ann@y.test>")).startswith("250")
                assert (await client.say("DATA")).startswith("354")
                client.writer.write(b"y" * 500 + b"\r\n" + b"x" * (length - 502) + b"\r\n.\r\n")
                reply = await client.reply()
                assert reply.startswith(refusal if number == 1 else "250"), reply
                await client.say("MAIL FROM:<a@x.test>")
        assert [one.bytes for one in provider.tally.mails] == [1000]


async def test_lines_are_bounded(plain: Provider) -> None:
    async with bare_client(plain) as client:
        await greeted(client)
        reply = await client.say("NOOP " + "x" * (3 * LONGEST_COMMAND))
        assert reply == "500 5.5.2 Error: line too long"
        client.write("MAIL FROM:<a@x.test>", "RCPT TO:<ann@y.test>", "DATA")
        await client.replies(3)
        client.write("x" * 999, ".")
        assert await client.reply() == "500 5.5.2 Error: a line of the mail is too long"
        assert (await client.say("NOOP")).startswith("250")
    assert plain.tally.accepted == 0


def buffered(reader: asyncio.StreamReader) -> int:
    buffer: bytearray = vars(reader)["_buffer"]
    return len(buffer)


async def test_an_endless_line_takes_no_memory() -> None:
    reader = asyncio.StreamReader()
    # No replies are sent here, so nothing is written.
    wire = Wire(reader, cast(asyncio.StreamWriter, None), idle_s=10)
    reading = asyncio.create_task(wire.read_line())
    for _ in range(20):
        reader.feed_data(b"x" * LONGEST_COMMAND)
        await eventually(lambda: buffered(reader) == 0)
        assert len(wire._received) <= 2 * LONGEST_COMMAND
    reader.feed_data(b"\r\nNOOP\r\n")
    with pytest.raises(LineTooLongError):
        await reading
    assert await wire.read_line() == b"NOOP"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("MAIL FROM:<a@x.test>", "503"),
        ("EHLO", "501"),
        (f"EHLO {'x' * 256}", "501"),
        (f"EHLO {'x' * 255}", "250"),
        ("NONSENSE", "500"),
        ("EHLO x\0", "500"),
    ],
)
async def test_unknown_commands_and_commands_before_ehlo_are_refused(
    plain: Provider, line: str, code: str
) -> None:
    async with bare_client(plain) as client:
        await client.reply()
        assert (await client.say(line)).startswith(code)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("RCPT TO:<ann@y.test>", "503"),
        ("DATA", "503"),
        ("MAIL FROM:a@x.test", "501"),
        ("MAIL TO:<a@x.test>", "501"),
        (f"MAIL FROM:<{'a' * 248}@x.test>", "501"),
        (f"MAIL FROM:<{'a' * 247}@x.test>", "250"),
        ("MAIL FROM:<a@x.test> NONSENSE=1", "555"),
        ("MAIL FROM:<a@x.test> SIZE=x", "501"),
        (f"MAIL FROM:<a@x.test> SIZE={'9' * 5000}", "501"),
        ("MAIL FROM:<ä@x.test>", "553"),
        ("MAIL FROM:<ä@x.test> SMTPUTF8", "250"),
        ("MAIL FROM:<> BODY=8BITMIME", "250"),
        ("mail from: <a@x.test>", "250"),
        ("STARTTLS", "503"),
        ("VRFY a", "252"),
    ],
)
async def test_commands_are_checked(plain: Provider, line: str, code: str) -> None:
    async with bare_client(plain) as client:
        await greeted(client)
        assert (await client.say(line)).startswith(code)


async def test_a_client_that_sends_only_errors_is_disconnected(plain: Provider) -> None:
    async with bare_client(plain) as client:
        await greeted(client)
        client.write(*["NONSENSE"] * 30)
        replies = [reply async for reply in _until_closed(client)]
    assert len(replies) == 21
    assert replies[-1] == "421 4.7.0 Error: too many errors"
    await eventually(lambda: plain.tally.endings == {Ending.SERVER: 1})


async def _until_closed(client: BareClient) -> AsyncIterator[str]:
    try:
        while reply := await client.reply():
            yield reply
    except ConnectionError:
        return


async def test_connections_are_counted_by_how_they_ended(plain: Provider) -> None:
    async with bare_client(plain) as client:
        await greeted(client)
        assert (await client.say("QUIT")).startswith("221")
        assert await client.reply() == ""
    async with bare_client(plain) as client:
        await greeted(client)
    await eventually(lambda: plain.tally.endings == {Ending.QUIT: 1, Ending.CLIENT: 1})
    plain.become(dataclasses.replace(PLAIN, idle_s=0.05))
    async with bare_client(plain) as client:
        await greeted(client)
        assert await client.reply() == "421 4.4.2 Timeout, closing connection"
        assert await client.reply() == ""
    await eventually(lambda: plain.tally.endings[Ending.IDLE] == 1)
    assert plain.tally.helo_names == {"client.x.test": 3}
    assert (plain.tally.connections, plain.tally.open_connections) == (3, 0)


async def test_the_profile_sets_the_greeting_delay_and_the_blank_lines_before_a_reply() -> None:
    profile = dataclasses.replace(PLAIN, greeting_delay_s=0.1, blank_lines=2)
    async with Provider(profile) as provider, bare_client(provider) as client:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.reader.readexactly(1), 0.02)
        assert (await client.reply()).startswith("220")
        await client.say("EHLO x.test")
        client.write("MAIL FROM:<a@x.test>", "RCPT TO:<ann@y.test>", "DATA", "", ".")
        await client.replies(3)
        assert [await client.reader.readline() for _ in range(2)] == [b"\r\n", b"\r\n"]
        assert (await client.reply()).startswith("250")


# TLS and AUTH --------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return self_signed(tmp_path / "certificates")


@pytest.fixture
async def gmail(certificate: Certificate) -> AsyncIterator[Provider]:
    async with Provider(GMAIL, accounts=ACCOUNTS, tls=server_context(certificate)) as provider:
        yield provider


async def secured(client: BareClient, certificate: Certificate) -> str:
    """Do STARTTLS; return the reply to the EHLO after it."""
    await greeted(client)
    assert (await client.say("STARTTLS")).startswith("220")
    await client.writer.start_tls(client_context(certificate))
    return await client.say("EHLO client.x.test")


async def test_tls_comes_before_auth_and_auth_before_mail(
    gmail: Provider, certificate: Certificate
) -> None:
    async with bare_client(gmail) as client:
        offered = await greeted(client)
        assert "STARTTLS" in offered
        assert "AUTH" not in offered
        must = "530 5.7.0 Must issue a STARTTLS command first."
        assert (await client.say("MAIL FROM:<a@x.test>")).startswith(must)
        assert (await client.say(f"AUTH PLAIN {encoded('x')}")).startswith(must)
    async with bare_client(gmail) as client:
        offered = await secured(client, certificate)
        assert "STARTTLS" not in offered
        assert "AUTH LOGIN PLAIN XOAUTH2 OAUTHBEARER" in offered
        refused = await client.say("MAIL FROM:<a@x.test>")
        assert refused.startswith("530-5.7.0 Authentication Required.")
        reply = await client.say(f"AUTH PLAIN {plain_login(USER, PASSWORD)}")
        assert reply.startswith("235")
        assert (await client.say("MAIL FROM:<a@x.test>")).startswith("250")


async def test_a_session_starts_again_after_starttls(
    gmail: Provider, certificate: Certificate
) -> None:
    async with bare_client(gmail) as client:
        await greeted(client)
        await client.say("STARTTLS")
        await client.writer.start_tls(client_context(certificate))
        assert (await client.say("MAIL FROM:<a@x.test>")).startswith("503")
        assert (await client.say("AUTH LOGIN")).startswith("503")


async def test_commands_pipelined_after_starttls_are_not_treated_as_encrypted(
    gmail: Provider,
) -> None:
    async with bare_client(gmail) as client:
        await greeted(client)
        client.write("STARTTLS", "MAIL FROM:<a@x.test>")
        assert "no commands allowed to pipeline after STARTTLS" in await client.reply()
        assert await client.reply() == ""


async def test_implicit_tls_needs_no_starttls(certificate: Certificate) -> None:
    async with Provider(
        GMAIL, accounts=ACCOUNTS, tls=server_context(certificate), implicit_tls=True
    ) as provider:
        assert provider.url(USER) == f"smtps://anna:secret@127.0.0.1:{provider.port}"
        async with bare_client(provider, tls=client_context(certificate)) as client:
            offered = await greeted(client)
            assert "STARTTLS" not in offered
            assert "AUTH" in offered


XOAUTH2 = "user={user}\x01auth=Bearer {secret}\x01\x01"
OAUTHBEARER = "n,a={user},\x01host=smtp.x.test\x01port=587\x01auth=Bearer {secret}\x01\x01"


@pytest.mark.parametrize(
    ("mechanism", "response", "secret"),
    [
        ("PLAIN", "\0{user}\0{secret}", PASSWORD),
        ("XOAUTH2", XOAUTH2, TOKEN),
        ("OAUTHBEARER", OAUTHBEARER, TOKEN),
    ],
)
@pytest.mark.parametrize("initial", [True, False])
async def test_only_the_right_secret_authenticates(
    mechanism: str, response: str, secret: str, initial: bool
) -> None:
    async with Provider(GMAIL, accounts=ACCOUNTS) as provider, bare_client(provider) as client:
        await greeted(client)

        async def sign_in(user: str, said: str) -> str:
            text = encoded(response.format(user=user, secret=said))
            if initial:
                return await client.say(f"AUTH {mechanism} {text}")
            assert await client.say(f"AUTH {mechanism}") == "334 "
            return await client.say(text)

        for user, said in ((USER, "wrong"), ("nobody", secret)):
            reply = await sign_in(user, said)
            if mechanism != "PLAIN":
                # The error comes as a challenge, which needs a response.
                error = json.loads(base64.b64decode(reply.removeprefix("334 ")))
                assert error["status"] in ("400", "invalid_token")
                reply = await client.say("" if mechanism == "XOAUTH2" else "AQ==")
            assert reply.startswith("535-5.7.8 Username and Password not accepted."), reply
            assert "p=BadCredentials" in reply
        assert (await sign_in(USER, secret)).startswith("235 2.7.0")
        assert (await client.say(f"AUTH {mechanism}")).startswith("503")


async def test_login_asks_for_name_and_password() -> None:
    async with Provider(GMAIL, accounts=ACCOUNTS) as provider, bare_client(provider) as client:
        await greeted(client)
        assert await client.say("AUTH LOGIN") == f"334 {encoded('Username:')}"
        assert await client.say(encoded(USER)) == f"334 {encoded('Password:')}"
        assert (await client.say(encoded(PASSWORD))).startswith("235")


async def test_a_revoked_token_no_longer_authenticates() -> None:
    accounts = {USER: Account(tokens={"old"})}
    async with Provider(GMAIL, accounts=accounts) as provider:
        for tokens, code in (({"old"}, "235"), ({"new"}, "334")):
            accounts[USER].tokens = tokens
            async with bare_client(provider) as client:
                await greeted(client)
                text = encoded(XOAUTH2.format(user=USER, secret="old"))
                assert (await client.say(f"AUTH XOAUTH2 {text}")).startswith(code)


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["AUTH PLAIN ???"], "501"),
        (["AUTH PLAIN", "*"], "501 5.7.0 Authentication cancelled"),
        ([f"AUTH PLAIN {encoded('no zero')}"], "501"),
        ([f"AUTH XOAUTH2 {encoded('auth=Bearer x')}"], "501"),
        (["AUTH CRAM-MD5"], "504"),
    ],
)
async def test_an_unfinished_auth_exchange_is_an_error(lines: list[str], code: str) -> None:
    async with Provider(GMAIL, accounts=ACCOUNTS) as provider, bare_client(provider) as client:
        await greeted(client)
        for line in lines:
            reply = await client.say(line)
        assert reply.startswith(code)


async def test_a_connection_is_closed_after_the_third_wrong_password() -> None:
    async with Provider(EXCHANGE_ONLINE, accounts=ACCOUNTS) as provider:
        async with bare_client(provider) as client:
            await greeted(client)
            for _ in range(3):
                await client.say("AUTH LOGIN")
                await client.say(encoded(USER))
                reply = await client.say(encoded("wrong"))
                assert reply.startswith("535 5.7.3 Authentication unsuccessful")
            assert await client.reply() == ""
        assert sum(provider.tally.refusals.values()) == 3


# Start, stop and change of a provider --------------------------------------------------------


async def test_a_stop_cuts_connections_and_what_was_written_is_complete(tmp_path: Path) -> None:
    provider = Provider(PLAIN, tally=Tally(tmp_path / "tally.jsonl"))
    async with provider, bare_client(provider) as client:
        await greeted(client)
        client.write("MAIL FROM:<a@x.test>", "RCPT TO:<ann@y.test>", "DATA", "", ".")
        await client.replies(4)
        await provider.cut()
        assert await client.reply() == ""
    events = [json.loads(line) for line in (tmp_path / "tally.jsonl").read_text().splitlines()]
    assert [(one["event"], one["connection"]) for one in events] == [
        ("accepted", 1),
        ("connection", 1),
    ]
    assert events[1]["ending"] == Ending.SERVER
    assert provider.tally.summary()["accepted"] == 1


async def test_a_provider_that_changes_its_profile_keeps_its_counts(plain: Provider) -> None:
    blocked = RefusingReply(Phase.MAIL, 550, "5.7.1", "blocked", closes=True)
    other: Profile = dataclasses.replace(
        PLAIN, always=(blocked,), rates=(Rate(1, MINUTE_S, blocked),)
    )
    for profile, code in ((PLAIN, "250"), (other, "550"), (PLAIN, "250")):
        plain.become(profile)
        async with bare_client(plain) as client:
            await greeted(client)
            assert (await client.say("MAIL FROM:<a@x.test>")).startswith(code)
            if code == "550":
                assert await client.reply() == ""
    assert plain.tally.connections == 3
    assert plain.tally.refusals == {"550 5.7.1 blocked": 1}


async def test_a_provider_runs_as_a_process_and_prints_what_it_counted(tmp_path: Path) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *(
            "-m",
            "outbox_server.deploy.providers",
            "gmail",
            "--no-tls",
            "--quota",
            "2",
            "--scale",
            "0.5",
        ),
        *("--tally", str(tmp_path / "tally.jsonl"), "--maildir", str(tmp_path / "maildir")),
        cwd=Path(__file__).parent.parent.parent,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        first = (await child.stderr.readline()).decode()
        assert first.startswith("a Gmail account (smtp.gmail.com): smtp://outbox:outbox@127.0.0.1:")
        reader, writer = await asyncio.open_connection("127.0.0.1", int(first.rpartition(":")[2]))
        client = BareClient(reader, writer)
        await greeted(client)
        await client.say(f"AUTH PLAIN {plain_login('outbox', 'outbox')}")
        client.write("MAIL FROM:<a@x.test>", "RCPT TO:<ann@y.test>", "DATA")
        client.write("Message-ID: <1@x.test>", "", ".")
        assert [reply[:3] for reply in await client.replies(4)] == ["250", "250", "354", "250"]
        child.send_signal(signal.SIGUSR1)
        summary = json.loads(await child.stdout.readline())
        assert (summary["accepted"], summary["open_connections"]) == (1, 1)
        assert (await client.say("QUIT")).startswith("221")
        writer.close()
        child.send_signal(signal.SIGTERM)
        rest, errors = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert child.returncode == 0, errors.decode()
    assert json.loads(rest)["endings"] == {"QUIT": 1}
    assert b"2 mails of an account in any 12h, then: 550 5.4.5" in errors
    assert len(list((tmp_path / "maildir/new").iterdir())) == 1
    assert len((tmp_path / "tally.jsonl").read_text().splitlines()) == 2
