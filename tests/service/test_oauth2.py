"""Senders that authenticate with OAuth 2.0: created by call, verified, sending, refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToJson
from outbox.v1 import sender_pb2
from outbox.v1.sender_service_pb2 import (
    DeleteSenderRequest,
    GetSenderRequest,
    ListSendersRequest,
    PauseSenderRequest,
    ResumeSenderRequest,
    UpdateSenderRequest,
    VerifySenderRequest,
)

from outbox_server.shared.secrets import SecretBox
from outbox_server.shared.smtp.oauth2_auth import Login
from outbox_server.shared.states import AttemptOutcome, JobState
from tests.dispatchers import running, settings_of
from tests.eventually import eventually
from tests.oauth2_installation import KEY, MAILBOX, REVOKED, OAuth2Installation, installed
from tests.oauth2_provider import Hold, PlannedAnswer
from tests.scheduler_stack import refusal_of, running_scheduler, stored


@pytest.fixture
async def installation(
    database_url: str, redis_url: str, tmp_path: Path
) -> AsyncIterator[OAuth2Installation]:
    async with installed(database_url, redis_url, tmp_path) as running:
        yield running


async def test_credentials_are_stored_and_returned_without_their_secrets(
    installation: OAuth2Installation,
) -> None:
    sender = await installation.sender(scope="mail")
    assert sender.smtp.oauth2 == sender_pb2.OAuth2Credentials(
        token_url=installation.provider.url,
        client_id="outbox-client",
        scope="mail",
        client_secret_set=True,
        refresh_token_set=True,
    )
    assert not sender.smtp.password_set
    stubs = installation.scheduler.senders
    get = GetSenderRequest(sender_id=sender.sender_id)
    assert stored(await stubs.GetSender(get)) == sender
    listed = await stubs.ListSenders(ListSendersRequest(user_id="ann"))
    assert list(listed.senders) == [sender]
    ((secret, token),) = installation.scheduler.rows(
        "SELECT client_secret, refresh_token FROM oauth2_credentials"
    )
    box = SecretBox([KEY])
    assert box.decrypt(secret) == installation.provider.client_secret
    assert box.decrypt(token) == installation.provider.refresh_token


async def test_a_new_sender_has_no_credentials_of_others(
    installation: OAuth2Installation,
) -> None:
    endpoint = sender_pb2.SmtpEndpoint(host="mail.example.com")
    for _ in range(2):
        await installation.scheduler.sender("bob", smtp=installation.endpoint())
        created = await installation.scheduler.sender(smtp=endpoint)
        assert not created.smtp.HasField("oauth2")
    update = UpdateSenderRequest(
        sender=sender_pb2.Sender(sender_id=created.sender_id, hourly_limit=7)
    )
    changed = await installation.scheduler.senders.UpdateSender(update)
    assert not changed.smtp.HasField("oauth2")
    assert not installation.scheduler.rows(
        "SELECT target FROM audit_events WHERE user_id = 'ann' AND after::text LIKE '%%oauth2%%'"
    )


async def test_a_preset_fills_in_fields_and_is_not_returned(
    installation: OAuth2Installation,
) -> None:
    sender = await installation.scheduler.sender(
        smtp=sender_pb2.SmtpEndpoint(
            preset=sender_pb2.SMTP_PRESET_MICROSOFT365,
            username=MAILBOX,
            oauth2=sender_pb2.OAuth2Credentials(
                client_id="id", client_secret="a-secret", tenant="example.onmicrosoft.com"
            ),
        )
    )
    assert sender.smtp == sender_pb2.SmtpEndpoint(
        host="smtp.office365.com",
        port=587,
        security=sender_pb2.SMTP_SECURITY_STARTTLS,
        username=MAILBOX,
        oauth2=sender_pb2.OAuth2Credentials(
            token_url="https://login.microsoftonline.com/example.onmicrosoft.com/oauth2/v2.0/token",
            client_id="id",
            scope="https://outlook.office365.com/.default",
            client_secret_set=True,
        ),
    )


async def test_a_preset_works_with_a_password_too(installation: OAuth2Installation) -> None:
    smtp = sender_pb2.SmtpEndpoint(
        preset=sender_pb2.SMTP_PRESET_GMAIL, username=MAILBOX, password="app word"
    )
    sender = await installation.scheduler.sender(smtp=smtp)
    assert (sender.smtp.host, sender.smtp.port) == ("smtp.gmail.com", 587)
    assert sender.smtp.password_set
    assert not sender.smtp.HasField("oauth2")


async def test_an_invalid_endpoint_is_refused_and_nothing_is_stored(
    installation: OAuth2Installation,
) -> None:
    endpoint = installation.endpoint()
    endpoint.password = "word"
    refusal = await refusal_of(installation.scheduler.sender(smtp=endpoint))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "SMTP_ENDPOINT_INVALID")
    assert set(refusal.violations) == {"sender.smtp.oauth2"}
    endpoint = installation.endpoint(token_url="http://127.0.0.1/token")
    refusal = await refusal_of(installation.scheduler.sender(smtp=endpoint))
    assert set(refusal.violations) == {"sender.smtp.oauth2.token_url"}
    assert installation.provider.refresh_token not in str(refusal)
    endpoint = sender_pb2.SmtpEndpoint(preset=9)  # type: ignore[arg-type]  # not a value
    refusal = await refusal_of(installation.scheduler.sender(smtp=endpoint))
    assert set(refusal.violations) == {"sender.smtp.preset"}
    assert installation.scheduler.value("SELECT count(*) FROM senders") == 0


async def test_an_endpoint_is_replaced_as_a_whole(installation: OAuth2Installation) -> None:
    sender = await installation.sender()
    ids = "SELECT id FROM oauth2_credentials"
    first = installation.scheduler.value(ids)
    changed = await installation.update(sender, display_name="Me")
    assert changed.smtp == sender.smtp
    assert installation.scheduler.value(ids) == first

    # Another host without the secrets: they are not sent to it.
    endpoint = installation.endpoint(client_secret="", refresh_token="")
    endpoint.host = "127.0.0.2"
    refusal = await refusal_of(installation.update(sender, smtp=endpoint))
    assert set(refusal.violations) == {"sender.smtp.oauth2"}
    assert installation.scheduler.value(ids) == first

    changed = await installation.update(sender, smtp=installation.endpoint(scope="other"))
    assert changed.smtp.oauth2.scope == "other"
    assert installation.scheduler.value(ids) > first

    by_password = sender_pb2.SmtpEndpoint(host="127.0.0.1", username="me", password="word")
    changed = await installation.update(sender, smtp=by_password)
    assert (changed.smtp.password_set, changed.smtp.HasField("oauth2")) == (True, False)
    assert installation.scheduler.rows(ids) == []


async def test_a_deleted_sender_leaves_no_secret(installation: OAuth2Installation) -> None:
    sender = await installation.sender()
    await installation.scheduler.senders.DeleteSender(
        DeleteSenderRequest(sender_id=sender.sender_id)
    )
    assert installation.scheduler.rows("SELECT * FROM oauth2_credentials") == []


async def test_a_sender_is_verified_with_an_access_token(installation: OAuth2Installation) -> None:
    sender = await installation.sender()
    answer = await installation.verify(sender)
    assert answer.ready, answer.failure
    (presented,) = installation.server.presented
    assert (presented.mechanism, presented.username) == ("XOAUTH2", MAILBOX)
    assert installation.server.mails == []


async def test_verifying_returns_the_error_of_the_provider(
    installation: OAuth2Installation,
) -> None:
    sender = await installation.sender()
    installation.provider.refresh_tokens.clear()
    answer = await installation.verify(sender)
    assert not answer.ready
    assert answer.failure == f"requesting an access token: {REVOKED}"
    assert not answer.HasField("smtp_code")
    assert installation.server.connections == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "169.254.169.254", "[::1]"])
async def test_a_token_url_may_not_point_into_the_operators_network(
    database_url: str, redis_url: str, installation: OAuth2Installation, host: str
) -> None:
    url = f"https://{host}:{installation.provider.port}/token"
    sender = await installation.sender(token_url=url)
    async with running_scheduler(database_url, redis_url, encryption_keys=KEY) as strict:
        answer = await strict.senders.VerifySender(VerifySenderRequest(sender_id=sender.sender_id))
    assert not answer.ready
    assert f"{host.strip('[]')} is in the operator's network" in answer.failure
    assert "OUTBOX_SMTP_ALLOW" in answer.failure
    assert installation.provider.connections == 0


async def test_another_user_neither_sees_nor_uses_the_credentials(
    installation: OAuth2Installation,
) -> None:
    sender = await installation.sender()
    for request in (
        installation.scheduler.senders.GetSender(
            GetSenderRequest(sender_id=sender.sender_id, user_id="bob")
        ),
        installation.scheduler.senders.VerifySender(
            VerifySenderRequest(sender_id=sender.sender_id, user_id="bob")
        ),
        installation.scheduler.senders.ResumeSender(
            ResumeSenderRequest(sender_id=sender.sender_id, user_id="bob")
        ),
    ):
        assert (await refusal_of(request)).reason == "SENDER_NOT_FOUND"
    assert installation.provider.connections == 0


async def test_dispatchers_share_one_token(installation: OAuth2Installation) -> None:
    sender = int((await installation.sender()).sender_id)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(running(settings_of(installation.values)))
        await installation.world.schedule(sender, 12)
        await eventually(lambda: installation.world.done(sender))
    assert await installation.world.states(sender) == {JobState.SENT: 12}
    assert len(installation.server.mails) == 12
    assert len({each.token for each in installation.server.presented}) == 1
    assert len(installation.provider.requests) == 1


async def test_a_revoked_token_costs_one_refresh_and_no_attempt(
    installation: OAuth2Installation,
) -> None:
    sender = await installation.sender()
    assert (await installation.verify(sender)).ready
    # As after a change of the password: the provider revokes the tokens that it has issued.
    installation.provider.access_tokens.clear()
    installation.server.presented.clear()
    async with running(settings_of(installation.values)):
        (job,) = await installation.world.schedule(int(sender.sender_id))
        await eventually(installation.world.done)
    (attempt,) = await installation.world.attempts(job)
    assert attempt.outcome is AttemptOutcome.SENT
    first, second = installation.server.presented
    assert (first.accepted, second.accepted) == (False, True)
    assert first.connection != second.connection
    assert len(installation.provider.requests) == 2


async def test_a_mailbox_that_refuses_every_token_is_tried_twice_per_session(
    installation: OAuth2Installation,
) -> None:
    installation.server._accepts = lambda _name, _token: False
    sender = await installation.sender()
    answer = await installation.verify(sender)
    assert (answer.ready, answer.smtp_code) == (False, 535)
    assert answer.failure.startswith("signing in (AUTH): 535 5.7.8"), answer.failure
    assert len(installation.server.presented) == 2
    assert len(installation.provider.requests) == 2
    async with running(settings_of(installation.values)):
        (job,) = await installation.world.schedule(int(sender.sender_id))
        attempt = (await eventually(lambda: installation.world.attempts(job)))[0]
    assert (attempt.outcome, attempt.smtp_code) == (AttemptOutcome.CONNECTION_FAILURE, 535)


async def test_a_refused_refresh_is_recorded_and_opens_no_connection(
    installation: OAuth2Installation,
) -> None:
    sender = await installation.sender()
    installation.provider.refresh_tokens.clear()
    async with running(settings_of(installation.values)):
        (job,) = await installation.world.schedule(int(sender.sender_id))
        attempt = (await eventually(lambda: installation.world.attempts(job)))[0]
    assert (attempt.message, attempt.smtp_code) == (REVOKED, None)
    assert not attempt.counted
    assert attempt.outcome is not AttemptOutcome.CONNECTION_FAILURE
    assert installation.server.connections == 0


async def test_a_provider_that_fails_counts_as_a_failed_connection(
    installation: OAuth2Installation,
) -> None:
    sender = await installation.sender()
    installation.provider.plan = [PlannedAnswer(503)]
    async with running(settings_of(installation.values)):
        (job,) = await installation.world.schedule(int(sender.sender_id))
        attempt = (await eventually(lambda: installation.world.attempts(job)))[0]
        assert attempt.outcome is AttemptOutcome.CONNECTION_FAILURE
        assert "answered 503" in (attempt.message or "")
        assert not attempt.counted


async def test_new_credentials_are_tried_at_once(installation: OAuth2Installation) -> None:
    good = installation.provider.refresh_token
    sender = await installation.sender(refresh_token="1//revoked-long-ago-0000")
    assert REVOKED in (await installation.verify(sender)).failure
    await installation.update(sender, smtp=installation.endpoint(refresh_token=good))
    assert (await installation.verify(sender)).ready
    assert len(installation.provider.requests) == 2


async def test_resuming_a_sender_requests_a_token_at_once(
    installation: OAuth2Installation,
) -> None:
    sender = await installation.sender()
    good = set(installation.provider.refresh_tokens)
    installation.provider.refresh_tokens.clear()
    assert REVOKED in (await installation.verify(sender)).failure
    installation.provider.refresh_tokens |= good
    stubs = installation.scheduler.senders
    # For a paused sender or an active one.
    await stubs.ResumeSender(ResumeSenderRequest(sender_id=sender.sender_id))
    assert (await installation.verify(sender)).ready
    await stubs.PauseSender(PauseSenderRequest(sender_id=sender.sender_id))
    await stubs.ResumeSender(ResumeSenderRequest(sender_id=sender.sender_id))
    assert (await installation.verify(sender)).ready
    await eventually(lambda: len(installation.provider.requests) == 3)


async def test_a_token_of_replaced_credentials_is_not_used(
    installation: OAuth2Installation,
) -> None:
    """A request under way ends for the old credentials, and the new ones get a separate request."""
    sender = await installation.sender()
    hold = Hold()
    installation.provider.plan = [hold]
    verifying = asyncio.create_task(installation.verify(sender))
    await eventually(lambda: installation.provider.held == 1)
    await installation.update(sender, smtp=installation.endpoint())
    hold.event.set()
    assert "were replaced meanwhile" in (await verifying).failure
    (old,) = installation.provider.access_tokens
    assert (await installation.verify(sender)).ready
    assert old not in {each.token for each in installation.server.presented}


@pytest.mark.parametrize("style", ["google", "microsoft"])
async def test_no_secret_is_stored_or_logged_in_clear(
    installation: OAuth2Installation, capfd: pytest.CaptureFixture[str], style: Any
) -> None:
    provider, server = installation.provider, installation.server
    provider.style, server._quotes = style, True
    reported: list[str] = []

    async def look(sender: sender_pb2.Sender) -> None:
        reported.append(MessageToJson(await installation.verify(sender)))

    sender = await installation.sender()
    reported.append(MessageToJson(sender))
    values = installation.values | {"log_level": "debug", "retry_backoff": "50ms"}
    async with running(settings_of(values)) as dispatcher:
        await look(sender)
        (job,) = await installation.world.schedule(int(sender.sender_id))
        await eventually(installation.world.done)
        (attempt,) = await installation.world.attempts(job)
        assert (attempt.message or "").endswith("taken from [token]")
        # The mail server quotes the token that it refuses, and the provider quotes the request.
        accepts, server._accepts = server._accepts, lambda _name, _token: False
        await look(sender)
        quoted = json.dumps(provider.requests[-1])
        provider.plan = [
            PlannedAnswer(400, {"error": "invalid_grant", "error_description": quoted})
            for _ in range(3)
        ]
        server._accepts = accepts
        installation.scheduler.execute(
            "UPDATE oauth2_credentials SET expires_at = now(), refresh_at = now(), retry_at = NULL,"
            " error = NULL"
        )
        await look(sender)
        (job,) = await installation.world.schedule(int(sender.sender_id))
        reported.append(str(await eventually(lambda: installation.world.attempts(job))))
        reported.append(str(await dispatcher.status()))
    reported.append(installation.dump())
    reported.append("".join(capfd.readouterr()))
    text = "\n".join(reported)
    assert "[secret]" in text
    assert "[token]" in text
    for secret in provider.secrets():
        login = Login(MAILBOX, secret)
        # Within a longer text, the base64 of a token is different.
        for form in (secret, login.xoauth2()[60:100], login.oauthbearer()[60:100]):
            assert form not in text
            assert form[:16] not in text
