"""Fixtures of the tests with Postfix, Exim and OpenSMTPD."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from outbox_server.services.dispatcher import dispatcher as dispatcher_module
from tests.dispatchers import options
from tests.mail_servers.authority import Authority
from tests.mail_servers.root import why_servers_cannot_run

# On a difference, its assertions show the compared values, as in a test module.
pytest.register_assert_rewrite("tests.mail_servers.sending")

Configure = Callable[..., dict[str, str]]


def pytest_configure() -> None:
    """End the run with one line if the servers cannot run; nothing is skipped."""
    if problem := why_servers_cannot_run():
        raise pytest.UsageError(problem)


@pytest.fixture(scope="session")
def authority() -> Authority:
    """The CA that signed the servers' certificates."""
    return Authority()


@pytest.fixture
def configure(database_url: str, redis_url: str, authority: Authority, tmp_path: Path) -> Configure:
    """Return a function that makes settings of a dispatcher that trusts the servers' CA."""
    ca = authority.write(tmp_path / "ca.pem")

    def build(**changes: str | int) -> dict[str, str]:
        # The relay is not used: every sender has its own endpoint. The time-outs allow for late
        # replies on a busy machine.
        given = {"smtp_ca": str(ca), "smtp_timeout": "60s", "lease": "60s"} | changes
        return options(database_url, redis_url, "smtp://127.0.0.1:9", **given)

    return build


@pytest.fixture(autouse=True)
def _no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable polling: the dispatcher acts only on computed times and on wake-ups."""
    monkeypatch.setattr(dispatcher_module, "HEARTBEAT", timedelta(hours=1))
