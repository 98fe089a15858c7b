"""The hostile user of a drill leaves no open job behind."""

from __future__ import annotations

from typing import Any

import pytest

from outbox_server.deploy.drill.hostile import HOSTILE_USER, SENDERS, HostileUser
from outbox_server.shared.states import JobState
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.scheduler_stack import running_scheduler
from tests.smtp_servers import Close, ScriptedServer


@pytest.mark.parametrize("variant", ["silent", "same_server"])
async def test_the_mail_of_the_hostile_user_is_cancelled_and_counted(
    database_url: str, redis_url: str, variant: str
) -> None:
    settings = options(database_url, redis_url, "smtp://127.0.0.1:1", smtp_timeout="1s")
    async with (
        ScriptedServer({"greeting": Close()}) as server,
        running_scheduler(
            database_url, redis_url, min_gap="0", smtp_ports="any", smtp_allow="127.0.0.1"
        ) as scheduler,
        running(settings_of(settings)),
    ):
        user = HostileUser([scheduler.address], None, server.port)
        await user.attack(variant, 0)
        assert user.answered.wrong == []

        def states() -> list[tuple[Any, ...]]:
            return scheduler.rows(
                "SELECT j.state, count(*) FROM email_jobs j JOIN senders s ON s.id = j.sender_id"
                " WHERE s.user_id = %s GROUP BY 1",
                HOSTILE_USER,
            )

        # The rows of a cancelled batch are updated in the background.
        await eventually(lambda: states() == [(int(JobState.CANCELLED), user.answered.accepted)])
        assert user.answered.accepted == user.answered.cancelled == 3 * SENDERS
