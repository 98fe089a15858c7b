"""PostgreSQL answers, but existing connections stay open and silent."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy.engine import make_url

from outbox_server.deploy.embedded.inbox import Inbox
from outbox_server.deploy.embedded.proxy import TcpProxy
from outbox_server.services.dispatcher import recovery as recovery_module
from outbox_server.shared.database import connecting as database
from outbox_server.shared.states import JobState
from tests.dispatchers import options, running, settings_of
from tests.eventually import eventually
from tests.world import World, at_least, jobs_in


class SilencingProxy(TcpProxy):
    """Like a load balancer that lost its table: connections stay open, but data is dropped."""

    _era = 0

    def lose(self) -> None:
        """Drop all data of the existing connections; new ones work as usual."""
        self._era += 1

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        era = self._era
        while data := await reader.read(65536):
            if era == self._era:
                writer.write(data)
                await writer.drain()
        writer.close()


async def test_silent_connections_are_closed_and_mail_continues(
    database_url: str, redis_url: str, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Jobs whose answer was lost are recovered when the lease has expired and this time has passed.
    monkeypatch.setattr(recovery_module, "GRACE", timedelta(seconds=1))
    short = {"lease": "4s"}
    url = make_url(database_url)
    port = url.port
    assert port is not None
    async with SilencingProxy(lambda: port) as proxy:
        through = url.set(port=proxy.port).render_as_string(hide_password=False)
        world = World(settings_of(options(database_url, redis_url, inbox.url, **short)))
        settings = settings_of(options(through, redis_url, inbox.url, min_gap="20ms", **short))
        async with world:
            senders = [await world.sender() for _ in range(6)]
            jobs = [job for each in senders for job in await world.schedule(each, 40)]
            # The limit applies to this process: on a busy machine the calls above take longer.
            with monkeypatch.context() as patch:
                patch.setattr(database, "_ANSWER_LIMIT_S", 1.5)
                async with running(settings) as dispatcher:
                    await eventually(lambda: at_least(60, inbox.mails))
                    proxy.lose()
                    await eventually(world.done)
                    await eventually(dispatcher.serving)

            assert await world.states() == {JobState.SENT: len(jobs)}
            # A mail may be sent twice if its record reached PostgreSQL only after the lease
            # expired.
            assert jobs_in(inbox.mails).keys() == {*jobs}
            assert jobs_in(inbox.mails).total() <= len(jobs) + 5
            await world.check_counts()
