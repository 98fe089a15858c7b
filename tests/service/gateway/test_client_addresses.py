"""The address of a client in the gateway's log, with and without proxies in front."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outbox_server.deploy.ports import LOOPBACK, free_port
from tests.eventually import eventually
from tests.scheduler_stack import running_scheduler
from tests.service.gateway.test_production import curl, running_gateway


@pytest.mark.parametrize(("proxies", "logged"), [(0, LOOPBACK), (1, "203.0.113.9")])
async def test_only_as_many_proxies_as_are_trusted_name_the_client(
    proxies: int, logged: str, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    port = free_port()
    url = f"http://{LOOPBACK}:{port}/api/senders?user_id=ann"
    async with running_scheduler(database_url, redis_url) as scheduler:
        options = (
            *("--listen", f"{LOOPBACK}:{port}", "--trusted-proxies", str(proxies)),
            *("--scheduler", scheduler.address, "--stats", scheduler.address),
        )
        async with running_gateway(tmp_path, *options):
            await eventually(lambda: curl(url))
            # What the client claims comes first, and what the proxy saw comes last.
            headers = ("-H", "x-forwarded-for: 198.51.100.1, 203.0.113.9", "-H", "x-request-id: r7")
            assert json.loads(await curl(*headers, url))["senders"] == []
    lines = [
        json.loads(line)
        for line in (tmp_path / "gateway.log").read_text().splitlines()
        if line.startswith("{")
    ]
    assert [line["peer"] for line in lines if line["request_id"] == "r7"] == [logged]
