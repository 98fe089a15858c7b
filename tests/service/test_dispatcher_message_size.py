"""A mail over OUTBOX_MAX_MESSAGE_BYTES ends FAILED and is sent to no server."""

from __future__ import annotations

import json

import pytest

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.shared.states import AttemptOutcome, JobState
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.world import World, jobs_in


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param("x" * 2_000, id="already as it is rendered"),
        pytest.param("\x01" * 330, id="only when it is encoded"),
    ],
)
async def test_a_mail_over_the_size_limit_fails_and_the_others_are_sent(
    database_url: str, redis_url: str, inbox: Inbox, cell: str
) -> None:
    settings = settings_of(options(database_url, redis_url, inbox.url, max_message_bytes=8_192))
    async with World(settings) as world, running(settings):
        sender = await world.sender()
        small, large, last = await world.schedule(sender, 3, load=False)
        await world.sql("UPDATE batches SET body = %s, variable_names = '{t}'", "{{ t }}" * 20)
        await world.sql("UPDATE email_jobs SET variables = %s", json.dumps(["Ann"]))
        await world.sql(
            "UPDATE email_jobs SET variables = %s WHERE id = %s", json.dumps([cell]), large
        )
        await world.loader.load([sender], committed=True)
        await eventually(world.done)

        assert jobs_in(inbox.mails) == {small: 1, last: 1}
        assert await world.in_state(JobState.SENT) == {small, last}
        assert await world.in_state(JobState.FAILED) == {large}
        [attempt] = await world.attempts(large)
        assert attempt.outcome is AttemptOutcome.PERMANENT_FAILURE
        assert attempt.smtp_code is None
        assert attempt.message is not None
        assert attempt.message.startswith("MESSAGE_TOO_LARGE: the mail has ")
        assert attempt.message.endswith(" bytes, OUTBOX_MAX_MESSAGE_BYTES permits 8,192")
        await world.check_counts()
