"""A provider refuses an access token: the sender's cooldown, and the events that end it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from outbox.v1 import email_job_pb2, sender_pb2
from outbox.v1 import email_job_service_pb2 as jobs_pb
from outbox.v1.sender_service_pb2 import SMTP_STEP_AUTH, DeleteSenderRequest

from outbox_server.shared.states import JobState
from tests import cooldowns
from tests.dispatchers import running, settings_of
from tests.eventually import eventually
from tests.oauth2_installation import REVOKED, OAuth2Installation, installed

ACCOUNT, AUTH = email_job_pb2.REPLY_CLASS_ACCOUNT, email_job_pb2.REPLY_CLASS_AUTH


@pytest.fixture
async def installation(
    database_url: str, redis_url: str, tmp_path: Path
) -> AsyncIterator[OAuth2Installation]:
    async with installed(database_url, redis_url, tmp_path) as running:
        yield running


@pytest.fixture
def ca(installation: OAuth2Installation) -> str:
    return Path(installation.values["smtp_ca"]).read_text()


@asynccontextmanager
async def cooling(
    installation: OAuth2Installation, **options: str
) -> AsyncIterator[tuple[sender_pb2.Sender, int]]:
    """Run a dispatcher, a sender in cooldown because of a revoked token, and its only job."""
    sender = await installation.sender()
    installation.provider.refresh_tokens.clear()
    async with running(settings_of(installation.values | {"cooldown": "1h"} | options)):
        (job,) = await installation.world.schedule(int(sender.sender_id))
        await eventually(lambda: rows(installation))
        yield sender, job


def rows(installation: OAuth2Installation) -> list[tuple[Any, ...]]:
    return installation.scheduler.rows(
        "SELECT sender_id, refusals, smtp_code, enhanced_code, message FROM cooldowns"
    )


async def explain(installation: OAuth2Installation, job: int) -> jobs_pb.ExplainEmailJobResponse:
    return await installation.scheduler.jobs.ExplainEmailJob(
        jobs_pb.ExplainEmailJobRequest(email_job_id=str(job))
    )


async def classes(
    installation: OAuth2Installation, job: int
) -> list[email_job_pb2.ReplyClass.ValueType]:
    listed = await installation.scheduler.jobs.ListAttempts(
        jobs_pb.ListAttemptsRequest(email_job_id=str(job))
    )
    return [each.reply_class for each in listed.attempts]


async def sent(installation: OAuth2Installation, sender: sender_pb2.Sender) -> bool:
    states = await installation.world.states(int(sender.sender_id))
    return states == {JobState.SENT: 1}


async def test_a_refused_token_begins_a_cooldown_with_the_providers_error(
    installation: OAuth2Installation,
) -> None:
    async with cooling(installation) as (sender, job):
        assert rows(installation) == [(int(sender.sender_id), 1, None, None, REVOKED)]
        shown = (await installation.get(sender)).cooldown
        assert (shown.message, shown.HasField("smtp_code")) == (REVOKED, False)
        assert shown.enhanced_code == ""
        found = await explain(installation, job)
        assert found.wait_reason == jobs_pb.WAIT_REASON_COOLDOWN
        since, probe = (
            f"{stamp.ToDatetime(UTC):%Y-%m-%d %H:%M:%S} UTC"
            for stamp in (shown.start_time, shown.next_probe_time)
        )
        assert found.explanation == (
            f"The sender has had no access token since {since} ({REVOKED}); "
            f"the next probe is at {probe}."
        )
        assert await classes(installation, job) == [ACCOUNT]
        assert installation.server.connections == 0


async def test_an_accepted_probe_ends_the_cooldown_of_a_token(
    installation: OAuth2Installation,
) -> None:
    good = set(installation.provider.refresh_tokens)
    async with cooling(installation, cooldown="1s") as (sender, job):
        await eventually(lambda: rows(installation)[0][1] > 1)
        # The failed probe took no step of the backoff. The next one may have begun.
        row = await installation.world.job(job)
        assert row.state in (JobState.SCHEDULED, JobState.SENDING)
        assert row.failures == 0
        installation.provider.refresh_tokens |= good
        await eventually(lambda: sent(installation, sender))
        assert rows(installation) == []
        assert set((await classes(installation, job))[:-1]) == {ACCOUNT}


async def test_a_resume_ends_the_cooldown_and_requests_a_token_at_once(
    installation: OAuth2Installation,
) -> None:
    good = set(installation.provider.refresh_tokens)
    async with cooling(installation) as (sender, _):
        installation.provider.refresh_tokens |= good
        resumed = await installation.resume(sender)
        assert not resumed.HasField("cooldown")
        assert resumed.smtp.oauth2 == sender.smtp.oauth2
        await eventually(lambda: sent(installation, sender))
        assert len(installation.provider.requests) == 2


async def test_a_new_endpoint_ends_the_cooldown_and_its_credentials_are_used(
    installation: OAuth2Installation,
) -> None:
    async with cooling(installation) as (sender, _):
        installation.provider.refresh_tokens.add("1//another-refresh-token-0001")
        changed = await installation.update(sender, smtp=installation.endpoint(scope="other"))
        assert not changed.HasField("cooldown")
        assert changed.smtp.oauth2.scope == "other"
        await eventually(lambda: sent(installation, sender))
        assert rows(installation) == []


async def test_a_deleted_sender_leaves_no_password_ca_credentials_or_cooldown(
    installation: OAuth2Installation, ca: str
) -> None:
    endpoint = installation.endpoint()
    endpoint.ca_certificates = ca
    by_token = await installation.scheduler.sender(smtp=endpoint)
    by_password = await installation.scheduler.sender(
        smtp=sender_pb2.SmtpEndpoint(host="127.0.0.1", username="me", password="word")
    )
    for sender in (by_token, by_password):
        cooldowns.begin(installation.scheduler.execute, sender.sender_id)
        await installation.scheduler.senders.DeleteSender(
            DeleteSenderRequest(sender_id=sender.sender_id)
        )
    assert rows(installation) == []
    assert installation.scheduler.rows("SELECT id FROM oauth2_credentials") == []
    left = installation.scheduler.rows("SELECT smtp_password, smtp_ca FROM senders")
    assert left == [(None, None)] * 2


async def test_a_mailbox_that_refuses_two_tokens_is_a_failed_authentication_and_no_cooldown(
    installation: OAuth2Installation,
) -> None:
    installation.server._accepts = lambda _name, _token: False
    sender = await installation.sender()
    async with running(settings_of(installation.values)):
        (job,) = await installation.world.schedule(int(sender.sender_id))
        assert set(await eventually(lambda: classes(installation, job))) == {AUTH}
    assert rows(installation) == []


async def test_a_senders_own_ca_works_with_a_token(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    async with installed(database_url, redis_url, tmp_path, apart=True) as installation:
        endpoint = installation.endpoint()
        untrusting = await installation.scheduler.sender(smtp=endpoint)
        answer = await installation.verify(untrusting)
        assert "is not trusted" in answer.failure
        endpoint.ca_certificates = (tmp_path / "mail" / "127.0.0.1.crt").read_text()
        sender = await installation.scheduler.sender(smtp=endpoint)
        assert sender.smtp.ca_certificates == endpoint.ca_certificates
        assert (await installation.verify(sender)).ready
        async with running(settings_of(installation.values)):
            await installation.world.schedule(int(sender.sender_id))
            await eventually(lambda: sent(installation, sender))


async def test_verifying_reports_a_refused_account(installation: OAuth2Installation) -> None:
    sender = await installation.sender()
    installation.provider.refresh_tokens.clear()
    answer = await installation.verify(sender)
    assert answer.failure == f"requesting an access token: {REVOKED}"
    assert (answer.reply_class, answer.HasField("smtp_code")) == (ACCOUNT, False)
    assert answer.failed_step == SMTP_STEP_AUTH
    assert rows(installation) == []


async def test_a_cooldown_that_began_with_a_reply_then_shows_the_providers_error(
    installation: OAuth2Installation,
) -> None:
    """The probe fails for another reason, which is then shown."""
    sender = await installation.sender()
    cooldowns.begin(installation.scheduler.execute, sender.sender_id)
    installation.scheduler.execute("UPDATE cooldowns SET next_probe_at = now()")
    installation.provider.refresh_tokens.clear()
    async with running(settings_of(installation.values | {"cooldown": "1h"})):
        await installation.world.schedule(int(sender.sender_id))
        await eventually(lambda: rows(installation)[0][1] == 3)
    assert rows(installation) == [(int(sender.sender_id), 3, None, None, REVOKED)]
    shown = (await installation.get(sender)).cooldown
    assert shown.next_probe_time.ToDatetime(UTC) > datetime.now(UTC)
